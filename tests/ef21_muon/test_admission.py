"""Who may be in a fleet and whose messages count, as all find alike from the same facts."""

import logging
import math
import socket
from dataclasses import replace

import pytest

from ef21_muon.fleet.admission import Card, FleetRefused, differing_from, refusals
from ef21_muon.fleet.verdict import REFUSALS, MessageChecks, far_off
from ef21_muon.transport.reach import Place, cut_off

RUN = {"optimizer.lr": "0.01", "steps": "600"}
OTHER = RUN | {"optimizer.lr": "0.02"}
FAR_PLACE = Place("far", "10.0.0.2", "far")
DEBIAN = Place("debian", "127.0.1.1", "debian")


def card(worker, since=0.0, has_synced=False, built=RUN, place=None, process=1):
    return Card(
        worker, process, since, has_synced, built, place or Place("near", "10.0.0.1", "near")
    )


ALREADY = "there is worker 0 on near (process 1) already: give this one another number"
ANOTHER = "another run is at this lighthouse, with worker 0 on near (process 1): optimizer.lr="
LOOPBACK = "worker 1 on debian (process 1) would listen at 127.0.1.1, which is no address for other"
CASES = {
    "alike": ([card(0), card(1), card(2)], {}),
    "the later of a number": ([card(0, 1.0), card(0, 2.0), card(1)], {1: ALREADY}),
    "its clock is ahead": ([card(0, 9.0, has_synced=True), card(0, 2.0), card(1)], {1: ALREADY}),
    "three of a number": ([card(0, 3.0), card(0, 1.0), card(0, 2.0)], {0: ALREADY, 2: ALREADY}),
    "an equal run": (
        [card(n, since, has_synced=since < 5) for n in (0, 1) for since in (1.0, 9.0)],
        {1: ALREADY, 3: ALREADY.replace("worker 0", "worker 1")},
    ),
    "another run, later": ([card(0), card(1), card(2, built=OTHER)], {2: ANOTHER + "0.02 (theirs"}),
    "another run of more workers": (
        [card(0, has_synced=True), card(0, built=OTHER), card(1, built=OTHER)],
        {1: ANOTHER + "0.02 (theirs 0.01)", 2: ANOTHER + "0.02 (theirs 0.01)"},
    ),
    "two runs at once": (
        [card(0, 2.0, built=OTHER), card(1, 1.0, built=OTHER), card(0, 2.0)],
        {2: "with worker 1 on near (process 1): optimizer.lr=0.01 (theirs 0.02)"},
    ),
    "another run in which a number is taken": (
        [card(0), card(0, 1.0), card(0, built=OTHER)],
        {1: ALREADY, 2: ANOTHER},
    ),
    "127.0.1.1": ([card(0), card(1, place=DEBIAN)], {1: LOOPBACK}),
    "127.0.1.1 was there first": ([card(0), card(1, has_synced=True, place=DEBIAN)], {0: LOOPBACK}),
    "one machine of 127.0.1.1": ([card(0, place=DEBIAN), card(1, place=DEBIAN)], {}),
    "several machines": ([card(0), card(1, place=FAR_PLACE)], {}),
    "an interface is named": ([card(0), card(1, place=replace(FAR_PLACE, address=None))], {}),
}


@pytest.mark.parametrize(("cards", "expected"), CASES.values(), ids=CASES)
def test_who_is_refused_is_the_same_for_all_in_any_order(cards, expected):
    found = refusals(cards)
    assert found.keys() == expected.keys()
    assert all(
        part in found[place] and "\n" not in found[place] for place, part in expected.items()
    )
    backwards = refusals(cards[::-1])
    assert {len(cards) - 1 - place: text for place, text in backwards.items()} == found


def test_differences_are_named_by_key_and_value_the_first_of_many():
    assert differing_from(RUN, RUN) == ""
    assert differing_from(OTHER, RUN) == "optimizer.lr=0.01 (theirs 0.02)"
    gone = "optimizer.lr=0.01 (theirs not there), steps=600 (theirs not there)"
    assert differing_from({}, RUN) == gone
    many = {f"layer {n}": "(2, 2)" for n in range(40)}
    assert differing_from(many, {}).endswith("layer 5=not there (theirs (2, 2)), and 34 more")


NAN, HUGE = math.nan, math.inf


@pytest.mark.parametrize(
    ("squares", "refused", "far"),
    [
        ({0: 1.0, 1: 1.1, 2: 0.9}, [], []),
        ({0: 1.0, 1: NAN, 2: 0.9}, [1], []),
        ({0: 1.0, 1: HUGE, 2: NAN}, [1, 2], []),
        ({0: 1.0, 1: 1e39}, [1], []),  # which float32 cannot square
        ({0: 1.0, 1: 1e12, 2: 0.9}, [], [1]),
        ({0: 1.0, 1: 1e12}, [], [1]),
        ({0: 1.0, 1: 1e12, 2: 1e12}, [], [1, 2]),
        ({0: 1.0, 1: 90.0**2, 2: 1.0}, [], []),  # data differ between workers
        ({0: 0.0, 1: 1.0, 2: 0.0}, [], []),  # others have not moved
        ({1: 1.0}, [], []),
        ({}, [], []),
    ],
)
def test_what_is_not_finite_is_refused_and_what_is_far_longer_is_named(
    squares, refused, far, caplog
):
    checks = MessageChecks(0)
    with caplog.at_level(logging.WARNING, "ef21_muon"):
        found, notes = checks.check(squares, 30, all_workers=False)
        assert found == refused and [*far_off(squares)] == far
        assert [note.split("'")[0] for note in notes] == [f"worker {n}" for n in refused + far]
        assert len(caplog.records) == len(notes)
        checks.check(squares, 60, all_workers=False)  # what is far off is said once
        assert len(caplog.records) == 2 * len(refused) + len(far)


def test_a_worker_that_is_refused_in_a_row_ends_and_so_do_all_together():
    checks = MessageChecks(1)
    for square in (NAN, NAN, 1.0, NAN, NAN):
        checks.check({0: 1.0, 1: square}, 30, all_workers=True)
    with pytest.raises(FleetRefused, match=f"worker 1's messages were not finite {REFUSALS} times"):
        checks.check({0: 1.0, 1: NAN}, 60, all_workers=True)
    MessageChecks(0).check({0: NAN}, 30, all_workers=False)  # others have just come
    with pytest.raises(FleetRefused, match="no worker's message is finite after step 30: lower"):
        MessageChecks(0).check({0: NAN, 1: HUGE}, 30, all_workers=True)


def names(monkeypatch, **addresses):
    def look_up(host, port, *arguments, **options):
        if host not in addresses:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (one, 0)) for one in addresses[host]]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    monkeypatch.setattr(socket, "gethostname", lambda: "debian")
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)


@pytest.mark.parametrize(
    ("host", "address"),
    [
        (None, "127.0.1.1"),
        ("debian", "127.0.1.1"),
        ("mine", "127.0.0.9"),  # the first of its addresses that this machine has
        ("behind-a-router", "127.0.1.1"),  # gloo then takes the machine's name
    ],
)
def test_where_gloo_listens(monkeypatch, host, address):
    mine, router = ["192.0.2.1", "127.0.0.9"], ["192.0.2.7"]
    names(monkeypatch, **{"debian": ["127.0.1.1"], "mine": mine, "behind-a-router": router})
    place = Place.here(host)
    assert place.address == address and place.is_loopback
    assert cut_off([place, place]) == [] and cut_off([FAR_PLACE, place]) == [1]
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth0")
    assert cut_off([FAR_PLACE, Place.here(host)]) == []


def test_a_name_without_an_address(monkeypatch):
    names(monkeypatch)
    assert Place.here().address == "127.0.0.1"  # as gloo does
    with pytest.raises(OSError, match="not known"):
        Place.here("nope.invalid")
