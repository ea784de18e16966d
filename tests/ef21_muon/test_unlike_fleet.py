"""A fleet on unlike processors: with which messages it trains, and who is refused with others."""

import json
from contextlib import ExitStack

import fleet as crew
import pytest
import torch
from fleet import lighthouse
from run import PATIENCE
from unlike_machines import NEEDS_MKL, OTHER, start_all
from workers import unlike_fleet

from ef21_muon.compressors import RankK
from ef21_muon.fleet import FleetRefused, shared

WORKERS = 2


def on_unlike_processors(test):
    """Left out of most runs, since test_unlike.py shows who gets which bits."""
    return pytest.mark.slow(NEEDS_MKL(test))


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    directory = tmp_path_factory.mktemp("unlike_fleet")
    with ExitStack() as stack:
        urls = [
            stack.enter_context(lighthouse(WORKERS if name in unlike_fleet.TOGETHER else 1))
            for name in unlike_fleet.FLEETS
        ]
        start_all("unlike_fleet.py", [{}, OTHER], directory, *urls)
    return [json.loads((directory / f"{one}.json").read_text()) for one in range(WORKERS)]


@on_unlike_processors
@pytest.mark.parametrize("name", unlike_fleet.TOGETHER)
def test_with_exact_messages_all_count_and_nobody_heals(reports, name):
    first, second = (report[name] for report in reports)
    rounds = [[WORKERS, False, 0]] * unlike_fleet.ROUNDS
    assert first["quorums"][1:] == second["quorums"][1:] == rounds  # after they joined
    assert first["state"] == second["state"]
    assert (
        first["synced_steps"] == WORKERS * unlike_fleet.ROUNDS * unlike_fleet.NESTEROV["sync_every"]
    )


@on_unlike_processors
@pytest.mark.parametrize("name", ["rank", "quantized rank"])
def test_with_low_rank_one_is_refused_and_the_other_trains(reports, name):
    (error,) = [report[name]["error"] for report in reports if "error" in report[name]]
    assert error.startswith("this worker gets other bits of w2s=") and "\n" not in error
    assert error.endswith("top_columns), or leave this one out")
    (other,) = [report[name] for report in reports if "error" not in report[name]]
    assert len(other["quorums"]) > unlike_fleet.ROUNDS


def test_one_that_decodes_other_bits_is_refused_and_the_others_train(monkeypatch):
    """Its fingerprints of what messages decode to are others, as on an unlike processor."""
    with lighthouse(2) as url, crew.workers(url, range(2), w2s=RankK(0.4)) as workers:
        digests = shared.digests

        def of_unlike(messages):
            return {name: bits + 1 for name, bits in digests(messages).items()}

        monkeypatch.setattr(shared, "digests", of_unlike)
        with crew.workers(url, [2], w2s=RankK(0.4)) as (unlike,):
            threads = [worker.start(30) for worker in (*workers, unlike)]
            for thread in threads:
                thread.join(PATIENCE)
        error = str(unlike.error)
        assert isinstance(unlike.error, FleetRefused)
        assert error.startswith("this worker gets other bits of w2s=") and "\n" not in error
        assert error.endswith("top_columns), or leave this one out")
        assert [worker.error for worker in workers] == [None, None]
        assert torch.equal(workers[0].global_params[30], workers[1].global_params[30])


def test_one_that_has_another_w_again_and_again_ends():
    """As with a compressor of one's own, of which other bits were not seen at the start."""
    with lighthouse(2) as url, crew.workers(url, range(3)) as workers:
        other = workers[1].optimizer
        mean = other._mean

        def with_other_bits(batch, messages):
            return mean(batch, messages) * (1 + 1e-6) if messages else None

        other._mean = with_other_bits
        crew.enter(workers)
        threads = [worker.start(30) for worker in workers]
        for thread in threads:
            thread.join(PATIENCE)
        assert str(workers[1].error).startswith(
            "this worker had another W than the others 3 times in a row, of the same messages: "
        )
        assert sum(one.healed for one in workers[1].fleet.quorums) == 2  # and then no more
        assert workers[0].error is workers[2].error is None
        assert torch.equal(workers[0].global_params[30], workers[2].global_params[30])
