"""Rounds whose number of steps changes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ef21_muon.transport.schedule import Rounds

STRETCHES = st.lists(st.tuples(st.integers(1, 4), st.integers(1, 7)), min_size=1, max_size=4)


@given(stretches=STRETCHES)
def test_the_round_of_a_step_is_as_by_counting(stretches):
    counted, sync_every, firsts = [], {}, []
    for rounds, length in stretches:
        sync_every[len(counted)] = length
        for _ in range(rounds):
            firsts.append(len(counted))
            counted += [(len(firsts) - 1, place, length) for place in range(length)]
    rounds = Rounds(sync_every)
    assert [rounds.of(step) for step in range(len(counted))] == counted
    assert rounds.of(len(counted) + 3 * length)[0] == len(firsts) + 3, "the last stretch continues"
    assert rounds.lengths == [length for _, length in stretches]


def test_they_are_written_in_words():
    assert str(Rounds(30)) == "30"
    assert str(Rounds({0: 120, 360: 60, 480: 5})) == "120, 60 from step 361, 5 from step 481"


@pytest.mark.parametrize(
    ("sync_every", "message"),
    [
        (0, "sync_every=0 is not allowed: give a whole number above 0"),
        (True, "sync_every=True is not allowed: give a whole number above 0"),
        ({}, "sync_every={} is not allowed: give the steps of a round from step 0"),
        ({3: 5}, "sync_every={3: 5} is not allowed: give the steps of a round from step 0"),
        ({0: 5, 10: 0}, "sync_every=0 is not allowed: give a whole number above 0"),
        (
            {0: 5, 12: 2},
            "sync_every={0: 5, 12: 2} is not allowed: 12 steps from step 0 on are "
            "no whole rounds of 5, give a multiple",
        ),
    ],
)
def test_others_are_refused(sync_every, message):
    with pytest.raises(ValueError) as error:
        Rounds(sync_every)
    assert str(error.value) == message
