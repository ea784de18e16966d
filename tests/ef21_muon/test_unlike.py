"""Workers on unlike processors: who gets the same bits, and what is said where they do not."""

import json

import pytest
from unlike_machines import NEEDS_MKL, OTHER, start_all
from workers import unlike

pytestmark = NEEDS_MKL
# The other one is unlike in all that may matter, so that what is the same depends on none of it.
ENVIRONMENTS = [{}, OTHER | {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "PASSIVE"}]
OF_STEP = "rank 1 gets other bits than rank 0 of step of "
OF_W2S = "rank 1 gets other bits than rank 0 of w2s="
OF_S2W = "rank 1 gets other bits than rank 0 of s2w="
BECAUSE = ": their processors, BLAS libraries or numbers of threads differ, and "


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    directory = tmp_path_factory.mktemp("unlike")
    start_all("unlike.py", ENVIRONMENTS, len(ENVIRONMENTS), directory)
    ranks = range(len(ENVIRONMENTS))
    found = [json.loads((directory / f"{rank}.json").read_text()) for rank in ranks]
    return found, (directory / "0.log").read_text()


@pytest.mark.parametrize("kind", unlike.COMPRESSORS)
def test_all_decode_the_same_bits(reports, kind):
    first, *others = (report["decoded"] for report in reports[0])
    for values in unlike.formats_of(kind):
        name = f"{kind} {values}"
        assert all(other[name] == first[name] for other in others), name


@pytest.mark.parametrize("kind", unlike.LOW_RANK)
def test_low_rank_is_other_bits(reports, kind):
    """Or there would be nothing to say about it."""
    first, other = (report["decoded"][f"{kind} float32"] for report in reports[0])
    assert first != other


TRAIN = {
    "muon sharded": "sharded",
    "muon rank0": "rank0",
    "muon s2w quantize": "sharded",
    "signs": "replicated",
    "sign muon": "replicated",
    "local normal2": "replicated",
    "local sign": "replicated",
    "local rank sharded": "sharded",
    "muon auto": "sharded",
    "local rank auto": "sharded",
}
REFUSED = {
    "muon replicated": (OF_STEP, "takes the servers' step: give server=sharded or rank0"),
    "signs adaptive": (OF_STEP, "takes the servers' step: give server=sharded or rank0"),
    "signs rank": (OF_W2S, "decodes all messages: give server=sharded or rank0, or for w2s comp"),
    "local rank": (OF_W2S, "decodes all messages: give server=sharded or rank0, or for w2s comp"),
    "muon s2w": (OF_S2W, "every rank decodes what the servers send: give for s2w identity, or "),
    "averaged": ("rank 1 gets other bits than rank 0 of inner=AdamW, group 0", "start all ranks"),
    "averaged sharded": ("rank 1 gets other bits than rank 0 of inner=AdamW", "start all ranks"),
}


def test_every_optimizer_is_in_a_table():
    assert unlike.OPTIMIZERS.keys() == TRAIN.keys() | REFUSED.keys() | {"unseen"}


def test_who_diverges_later_is_shown_why(reports):
    lines = {report["unseen"]["error"] for report in reports[0]}
    assert len(lines) == 1, "on all ranks alike"
    (line,) = lines
    assert " differs between rank 0 and rank 1: all workers hold the same parameters; they " in line
    assert "they compute other bits: give server=sharded or rank0, give compressors " in line
    assert line.endswith("else one was changed or damaged: resume from a checkpoint")


@pytest.mark.parametrize("name, server", TRAIN.items(), ids=TRAIN)
def test_they_train_to_the_same_bits(reports, name, server):
    assert [report[name] for report in reports[0]] == [{"server": server}] * len(ENVIRONMENTS)


@pytest.mark.parametrize("name, words", REFUSED.items(), ids=REFUSED)
def test_what_would_part_is_refused_before_the_first_step(reports, name, words):
    lines = {report[name].get("error") for report in reports[0]}
    assert len(lines) == 1, "on all ranks alike"
    (line,) = lines
    first, last = words
    assert line.startswith(first) and BECAUSE in line and last in line and "\n" not in line


def test_another_placement_is_said(reports):
    """In a line for each optimizer, on rank 0."""
    lines = reports[1].splitlines()
    assert len(lines) == 2
    assert all(line.endswith("server=auto is therefore sharded, not replicated") for line in lines)
