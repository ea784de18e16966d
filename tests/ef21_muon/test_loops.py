"""In other projects' loops on two ranks: nanoGPT's, accelerate's and transformers' Trainer."""

import json

import pytest
from run import torchrun


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    directory = tmp_path_factory.mktemp("loops")
    torchrun("loops.py", directory, ranks=2)
    return [json.loads((directory / f"rank{rank}.json").read_text()) for rank in range(2)]


def test_nanogpts_loop_resumes_from_a_checkpoint_of_all_ranks(reports):
    (first, *_), (second, *_) = (report["nanogpt"] for report in reports)
    assert first == second, "workers agree"
    for report in reports:
        trained, resumed, (before, after), _ = report["nanogpt"]
        assert trained == resumed
        assert after < before - 0.5


def test_nanogpts_checkpoint_of_rank_0_is_refused_on_the_other(reports):
    errors = [report["nanogpt"][-1] for report in reports]
    assert errors[0] == "no error"
    assert errors[1].startswith("the state is of rank 0 (here 1): ")
    assert errors[1].endswith("save full_state_dict() and load that on all")


def test_accelerate_prepares_all_but_the_model(reports):
    first, second = (report["accelerate"] for report in reports)
    assert first[0] == second[0], "workers agree"
    assert first[1] == second[1] == first[2] == 8, "of 16 batches half are each worker's"
    assert first[3] != second[3], "and they are different ones"


def test_transformers_trainer_is_given_its_distributed_mode(reports):
    for report in reports:
        assert report["trainer"].startswith("the model is in DistributedDataParallel, which sends")


def test_transformers_trainer_trains_without_it(reports):
    (first, steps, (before, after)), (second, *_) = (r["local trainer"] for r in reports)
    assert first == second and steps == 8
    assert after < before - 0.5


def test_muon_for_matrices_and_adamw_for_the_rest(reports):
    (first, (before, after)), (second, _) = (report["muon and adamw"] for report in reports)
    assert first == second
    assert after < before - 0.2
