"""What a run counts and logs, in this process: rates, bytes, and passes that are reduced once."""

import json
from types import SimpleNamespace

import pytest
import torch
from workers.resume import run_alone

from baselines import Muon
from ef21_muon import param_groups
from model import GPT, GPTConfig
from training.gradients import GradientComputation
from training.progress import Progress

PARAMETERS = 20_480
SHORT = ("steps=5", "checkpoint.every=0", "log_every=1", "eval.every=3", "schedule.warmup=0.4")


@pytest.fixture(scope="module")
def records(small, tmp_path_factory):
    """Of local steps, whose last round is shorter."""
    directory = tmp_path_factory.mktemp("run")
    rounds = ("optimizer=local", "optimizer.sync_every=2", "compressor@w2s=natural")
    run_alone(directory, *small, *SHORT, *rounds)
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def test_a_records_rate_is_that_of_its_step(records):
    """The warm-up is two steps long, and the rate then falls over the cooldown's steps."""
    rates = [one["lr"] for one in records if one["record"] == "train"]
    top = rates[1]
    assert rates[0] == pytest.approx(top / 2) and rates[2] <= top and rates[4] < rates[3]


def test_what_is_left_at_the_end_is_sent(records):
    """Two whole rounds, and the last step."""
    sent = {one["step"]: one["w2s_bytes"] for one in records if one["record"] == "train"}
    assert sent[4] == 2 * sent[2] and records[-1]["w2s_bytes"] == 3 * sent[2]


@pytest.mark.parametrize("ranks", [1, 3])
def test_bytes_are_told_apart(ranks):
    """What goes over the wire is this rank's, all else that of its worker's ranks together."""
    counts = {"w2s_bytes": 1, "s2w_bytes": 2, "received_bytes": 3, "wire_tx_bytes": 4}
    mesh = SimpleNamespace(total=lambda *own: [ranks * one for one in own]) if ranks > 1 else None
    optimizer = SimpleNamespace(**counts, mesh=mesh)
    workers = SimpleNamespace(device=torch.device("cpu"))
    found = Progress(workers, optimizer, 1, lambda step: step).byte_counts()
    assert found == {key: ranks * one for key, one in counts.items()} | {"wire_tx_bytes": 4}


def test_the_bytes_of_a_worker_alone(records):
    """It is its own server: what it receives is what the server sends back."""
    end = records[-1]
    assert end["received_bytes"] == end["s2w_bytes"] == 3 * 4 * PARAMETERS
    assert end["wire_tx_bytes"] == 0 < end["w2s_bytes"] < end["s2w_bytes"]
    assert end["uncompressed_bytes"] == 5 * 4 * PARAMETERS


def test_gradients_of_several_passes_are_all_reduced_once(process_group):
    model = GPT(GPTConfig(layers=1, width=16, heads=2, context=8, vocab_size=16))
    optimizer = Muon(param_groups(model, roles={"blocks.*": "hidden"}))
    gradients = GradientComputation(model, optimizer, torch.device("cpu"), "float32", False)
    tokens = torch.randint(16, (2, 9), generator=torch.Generator().manual_seed(0))
    loss = gradients.compute(3 * [[tokens[:, :-1], tokens[:, 1:]]])
    assert optimizer.w2s_bytes == 4 * model.config.parameter_count
    found = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    one = model(tokens[:, :-1], tokens[:, 1:])
    one.backward()
    torch.testing.assert_close(loss, one.detach())
    torch.testing.assert_close(found, [parameter.grad for parameter in model.parameters()])
