"""The list of faults fits the code: each changes its file, which still compiles."""

from collections import Counter

import pytest
from run import ROOT

from tests.mutants.mutation import Mutation
from tests.mutants.mutations import MUTATIONS


@pytest.mark.parametrize("one", MUTATIONS, ids=lambda one: one.fault)
def test_a_fault_is_a_change_of_one_place(one):
    text = (ROOT / one.file).read_text()
    changed = one.applied(text)
    assert changed != text
    compile(changed, one.file, "exec")
    assert all((ROOT / "tests" / name).is_file() for name in one.tests.split())


def test_faults_have_names_of_their_own():
    (most,) = Counter(one.fault for one in MUTATIONS).most_common(1)
    assert most[1] == 1, most
    assert len(MUTATIONS) >= 70


@pytest.mark.parametrize("text", ["b", "a a"])
def test_a_text_that_does_not_stand_once_is_named(text):
    with pytest.raises(ValueError, match=r"a fault: 'a' stands \d times in model.py"):
        Mutation("a fault", "model.py", "a", "c", "").applied(text)
