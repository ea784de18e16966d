"""Compressors that change with the round: what is sent, what is counted, what is refused."""

import pytest
import torch
from one_worker import build, copies, set_gradients

from ef21_muon import Dense, EF21Muon, Identity, Natural, RankK, Switch, TopK
from ef21_muon.messages.switch import in_round, starts
from model import GPT, GPTConfig
from training.config import compose
from training.method import build_optimizer
from training.plan import plan
from training.report import group_table
from training.workers import RunError, Workers

LEVELS = [RankK(0.1, "natural"), TopK(0.3), Identity()]
THREE = Switch(LEVELS[0], Switch(LEVELS[1], LEVELS[2], 4), 2)


def take_rounds(optimizer, parameters, rounds):
    for seed in rounds:
        set_gradients(parameters, seed)
        optimizer.step()


def test_a_switch_says_which_compressor_is_when():
    assert starts(THREE) == {0, 2, 4}
    assert [LEVELS.index(in_round(THREE, round)) for round in range(6)] == [0, 0, 1, 1, 2, 2]
    assert starts(LEVELS[0]) == {0} and in_round(LEVELS[0], 7) is LEVELS[0]


def test_a_switched_run_is_runs_that_hand_over_their_state():
    """Bit for bit: three optimizers with one level each, the state of one loaded into the next."""
    parameters, optimizer = build(w2s=THREE, beta=0.3)
    take_rounds(optimizer, parameters, range(6))
    others, previous, sent = None, None, 0
    for place, level in enumerate(LEVELS):
        now, one = build(w2s=level, beta=0.3)
        if previous:
            for mine, theirs in zip(now.values(), others.values(), strict=True):
                mine.data.copy_(theirs.data)
            its_own = {"of": one.state_dict()["of"]}  # other compressors are refused otherwise
            one.load_state_dict(previous.state_dict() | its_own)
        take_rounds(one, now, range(2 * place, 2 * place + 2))
        sent += 2 * one.exchange.w2s_bytes
        others, previous = now, one
    for mine, theirs in zip(copies(parameters), copies(others), strict=True):
        assert torch.equal(mine, theirs)
    assert optimizer.w2s_bytes == sent
    assert optimizer.s2w_bytes == 6 * optimizer.exchange.s2w_bytes


def test_what_is_counted_after_every_round():
    parameters, optimizer = build(w2s=THREE, first_message="exact")
    entries = sum(parameter.numel() for parameter in parameters.values())
    by_round = [Identity(), LEVELS[0], LEVELS[1], LEVELS[1], LEVELS[2], LEVELS[2]]
    expected = 0
    for round, level in enumerate(by_round):
        shapes = [(batch.shape, len(batch.params)) for batch in optimizer.batches]
        size = sum(n * level.fit(*shape).payload_bytes(*shape) for shape, n in shapes)
        assert size == optimizer.exchange.w2s_bytes
        expected += size
        take_rounds(optimizer, parameters, [round])
        assert optimizer.w2s_bytes == expected
    assert size == 4 * entries


def test_groups_may_switch_at_different_rounds():
    weights = [torch.nn.Parameter(torch.eye(8)) for _ in range(2)]
    groups = [
        {"params": weights[:1], "w2s": Switch(Dense("natural"), Identity(), 1)},
        {"params": weights[1:], "w2s": Switch(Dense("natural"), Identity(), 2)},
    ]
    optimizer = EF21Muon(groups)
    natural, whole = Dense("natural").payload_bytes(8, 8), 4 * 64
    seen = []
    for _ in range(3):
        for weight in weights:
            weight.grad = torch.randn(8, 8)
        seen.append(optimizer.exchange.w2s_bytes)
        optimizer.step()
    assert seen == [2 * natural, natural + whole, 2 * whole]
    assert optimizer.w2s_bytes == sum(seen)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ((Natural(), Identity(), 3), "first=.*: give a Compressor of ef21_muon"),
        ((Identity(), None, 3), "later=None: give a Compressor of ef21_muon"),
        ((THREE, Identity(), 3), "first=.*: give a Compressor of ef21_muon"),
        ((Identity(), Identity(), 0), "start=0: give a round, a whole number above 0"),
        ((Identity(), Identity(), 2.5), "start=2.5: give a round, a whole number above 0"),
        ((Identity(), THREE, 2), "start=2 before a later one of 2: let it rise"),
    ],
)
def test_what_a_switch_refuses(arguments, told):
    with pytest.raises(ValueError, match=told):
        Switch(*arguments)


def test_a_switch_is_for_workers_alone():
    with pytest.raises(ValueError, match=r"s2w=.* is not allowed: give a Compressor of ef21_muon"):
        build(s2w=THREE)


def test_a_plan_counts_every_phase():
    given = ("model=tiny", "compressor@w2s=switch", "w2s.start=3", "steps=10")
    _, rounds, *_ = plan(compose(given).config).split("\n\n")
    first, later = (line.split() for line in rounds.splitlines() if line.startswith("4 "))
    sizes = [int(line[2].replace(",", "")) for line in (first, later)]
    assert (first[1], later[1]) == ("1", "4")
    assert int(first[5].replace(",", "")) == 3 * sizes[0] + 7 * sizes[1]
    assert sizes[1] > sizes[0]


def test_the_table_of_a_run_says_what_is_sent_when():
    config = compose(("model=tiny", "compressor@w2s=switch")).config
    optimizer = build_optimizer(config, GPT(GPTConfig(1, 32, 2, 32, 256)))
    rank, dense = RankK(0.15, "natural"), Dense("natural")
    lines = group_table(optimizer, Workers()).splitlines()
    hidden = next(line for line in lines if " 32x32 " in line)
    assert "rank 15% natural, dense natural from step 241" in hidden
    assert f"{4 * rank.payload_bytes(32, 32):,}, {4 * dense.payload_bytes(32, 32):,}" in hidden


def test_an_exact_first_message_may_be_the_only_one():
    given = ("model=tiny", "optimizer.first_message=exact", "steps=1")
    optimizer = build_optimizer(compose(given).config, GPT(GPTConfig(1, 32, 2, 32, 256)))
    assert [phase.start for phase in optimizer.phases] == [0, 1]


def test_a_start_that_is_never_reached_is_refused():
    config = compose(("model=tiny", "compressor@w2s=switch", "steps=240")).config
    with pytest.raises(RunError, match=r"w2s\.start=240 is not below steps=240"):
        build_optimizer(config, GPT(GPTConfig(1, 32, 2, 32, 256)))
