"""What takes two ranks to be seen; the ranks: ../support/workers/two_ranks.py."""

import json

import pytest
import torch
from run import torchrun
from workers.two_ranks import EXCHANGED, PLACEMENTS, UNDER_WAY

RANKS = 2


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    directory = tmp_path_factory.mktemp("two_ranks")
    torchrun("two_ranks.py", directory, ranks=RANKS)
    return [json.loads((directory / f"rank{rank}.json").read_text()) for rank in range(RANKS)]


@pytest.mark.parametrize(("method", "server"), EXCHANGED)
def test_an_exchanged_compressor_continues_as_one_that_was_built_with_it(reports, method, server):
    ends = [report[f"exchanged {method} {server}"] for report in reports]
    for end in ends:
        assert end["found"] == end["built"]
    first, other = (end["found"][0] for end in ends)
    assert first == other  # W


def test_ranks_that_exchange_it_for_different_ones_are_refused(reports):
    (line,) = {report["exchanged apart"] for report in reports}
    assert line.startswith("w2s of group 0 is TopK(fraction=0.1, ") and "\n" not in line
    assert line.endswith("on rank 1: give all workers the same optimizer")


@pytest.mark.parametrize("server", PLACEMENTS)
def test_bfloat16_moves_by_what_is_less_than_its_last_bit_and_a_resume_keeps_x(reports, server):
    ends = [report[f"bfloat16 {server}"] for report in reports]
    for end in ends:
        parameter, resumed = map(torch.tensor, end["W"])
        assert torch.equal(parameter, resumed)
        torch.testing.assert_close(parameter, torch.full((4, 1), 0.98), rtol=0, atol=2**-9)
        model, of_resumed = end["X"]
        assert model == of_resumed
        if model is not None:  # served there
            torch.testing.assert_close(torch.tensor(model), torch.full((4, 1), 0.98))
    assert ends[0]["W"] == ends[1]["W"]
    assert sum(end["X"][0] is not None for end in ends) == (RANKS if server == "replicated" else 1)


def test_a_copy_of_an_optimizer_that_is_alone_sends_nothing_either(reports):
    for report in reports:
        (_, expected), *copies = report["alone"].values()
        assert len(copies) == 2
        for sent, found in copies:
            assert sent == 0 and found == expected
    assert reports[0]["alone"]["as it is"] != reports[1]["alone"]["as it is"]


@pytest.mark.parametrize("method", ["ef21", "rank0", "local"])
def test_servers_broadcast_by_nccl_and_send_by_gloo(reports, method):
    gloo, nccl = ([r[f"back {method} {name}"] for r in reports] for name in ("gloo", "nccl"))
    for sent, broadcast in zip(gloo, nccl, strict=True):
        assert broadcast["found"] == sent["found"]
        assert broadcast["counts"][:3] == sent["counts"][:3]
        assert broadcast["received"] == sent["received"]
        assert sent["broadcasts"] == 0 < broadcast["broadcasts"]
    of_ranks = [sum(end["counts"][3] for end in ends) for ends in (gloo, nccl)]
    assert of_ranks[0] == pytest.approx(of_ranks[1], abs=1)  # a rank's is a mean, rounded down


@pytest.mark.parametrize(("server", "streaming"), UNDER_WAY)
def test_agreement_is_checked_whatever_is_under_way(reports, server, streaming):
    for report in reports:
        late, _, batches, *_, then = report[f"under way {server} {streaming}"].split()
        assert then == "0" and (late != batches if streaming else late == batches)
