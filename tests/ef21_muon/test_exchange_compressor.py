"""A compressor that takes another's place between rounds; on two ranks see test_two_ranks.py."""

import copy
from itertools import cycle

import pytest
import torch
from a_round import a_round
from one_layer import layer, take_steps

from ef21_muon import ALONE, AveragedGradients, EF21Muon, LocalSteps
from ef21_muon.compressors import Identity, Quantize, RankK, TopK
from ef21_muon.compressors.base import Compressor


def sgd(p):
    return torch.optim.SGD(p, lr=0.1, momentum=0.9)


METHODS = {
    "ef21": lambda p, w2s: EF21Muon(p, w2s=w2s, s2w=TopK(0.5)),
    "ef14": lambda p, w2s: EF21Muon(p, w2s=w2s, feedback="ef14", server_momentum=0.5),
    "none": lambda p, w2s: EF21Muon(p, w2s=w2s, feedback="none"),
    "local": lambda p, w2s: LocalSteps(
        EF21Muon(p, process_group=ALONE), sync_every=2, w2s=w2s, outer_momentum=0.5
    ),
    "local, ef21": lambda p, w2s: LocalSteps(sgd(p), sync_every=2, w2s=w2s, feedback="ef21"),
    "local, streaming": lambda p, w2s: LocalSteps(sgd(p), sync_every=8, w2s=w2s, streaming=True),
    "averaged": lambda p, w2s: AveragedGradients(sgd(p), w2s=w2s),
}
EVERY = {"local": 2, "local, ef21": 2, "local, streaming": 8}
FIRST = TopK(0.2)
LATER = {"rank": RankK(0.4, "natural"), "quantize": Quantize("int4"), "identity": Identity()}


def trained(method, steps, w2s=FIRST):
    model = layer()
    optimizer = METHODS[method](list(model.parameters()), w2s)
    take_steps(model, optimizer, steps)
    return model, optimizer


def everything(model, optimizer):
    """The parameters, all that is remembered, and the bytes, as plain values."""
    nested = [optimizer, *optimizer.inner]
    state = [
        {key: t.tolist() for key, t in own.items()} for o in nested for own in o.state.values()
    ]
    return [p.tolist() for p in model.parameters()], state, optimizer.traffic


# Every method with one of them in turn, and one method with all.
PAIRS = [*zip(METHODS, cycle(LATER), strict=False), ("ef21", "quantize"), ("ef21", "identity")]


@pytest.mark.parametrize(("method", "later"), PAIRS)
def test_it_continues_as_one_that_was_built_with_it_and_takes_over_the_state(method, later):
    exchanged, last = (rounds * EVERY.get(method, 1) for rounds in (2, 5))
    model, optimizer = trained(method, exchanged)
    remembered = everything(model, optimizer)
    optimizer.exchange_compressor(LATER[later])
    assert everything(model, optimizer) == remembered  # feedback too
    other_model = copy.deepcopy(model)
    other = METHODS[method](list(other_model.parameters()), LATER[later])
    other.load_state_dict(optimizer.state_dict())
    for step in range(exchanged, last):
        take_steps(model, optimizer, 1, first=step)
        take_steps(other_model, other, 1, first=step)
        assert everything(model, optimizer) == everything(other_model, other)
    assert everything(model, optimizer) != everything(*trained(method, last))


@pytest.mark.parametrize(("method", "later"), PAIRS)
def test_bytes_are_of_the_one_that_sends(method, later):
    every = EVERY.get(method, 1)
    model, optimizer = trained(method, 2 * every)
    first, sent = a_round(optimizer).w2s_bytes, optimizer.w2s_bytes
    assert sent == 2 * first
    optimizer.exchange_compressor(LATER[later])
    take_steps(model, optimizer, every)
    fitted = [(b, LATER[later].fit(*b.shape)) for b in optimizer.batches]
    expected = sum(len(b.params) * c.payload_bytes(*b.shape) for b, c in fitted)
    assert optimizer.w2s_bytes - sent == expected == a_round(optimizer).w2s_bytes != first


def test_of_groups_that_have_a_name_one_may_be_meant():
    model = layer()
    groups = [
        {"params": [model.weight], "name": "matrices"},
        {"params": [model.bias], "name": "vectors"},
    ]
    optimizer = EF21Muon(groups, w2s=FIRST)
    optimizer.exchange_compressor(LATER["rank"], "matrices")
    of_groups = [group["w2s"] for group in optimizer.param_groups]
    assert of_groups == [LATER["rank"], FIRST]
    take_steps(model, optimizer, 2)


def test_the_first_message_stays_exact():
    def first_estimate(exchanges):
        model = layer()
        optimizer = EF21Muon(model.parameters(), w2s=FIRST, first_message="full")
        if exchanges:
            optimizer.exchange_compressor(TopK(0.1))
        take_steps(model, optimizer, 1)
        estimate = optimizer.state[model.weight]["gradient_estimate"].clone()
        before = optimizer.w2s_bytes
        take_steps(model, optimizer, 1, first=1)
        return estimate, optimizer.w2s_bytes - before

    (expected, _), (found, then) = first_estimate(False), first_estimate(True)
    assert torch.equal(found, expected) and found.count_nonzero() == found.numel()
    assert then == sum(TopK(0.1).payload_bytes(8, n) for n in (6, 1))


class Mute(Compressor):
    """A user's own, which does not say what it sent."""

    def payload_bytes(self, m, n):
        return m * n

    def title(self):
        return "mute"


ALL_LOSSLESS = (lambda p: AveragedGradients(sgd(p)), 2)
REFUSED = {  # how it is built, the steps before, what is given, and what is said
    "no compressor": (
        *(lambda p: EF21Muon(p, w2s=FIRST), 2, ("topk",)),
        r"^w2s='topk' lacks its fraction: write topk:FRACTION",
    ),
    "no group": (
        *(lambda p: EF21Muon([{"params": p, "name": "all"}], w2s=FIRST), 2, (TopK(0.1), "head")),
        r"^group='head' is not a group of this optimizer: it has all$",
    ),
    "with a delay": (
        *(lambda p: LocalSteps(sgd(p), sync_every=3, w2s=FIRST, sync_delay=1), 3, (TopK(0.1),)),
        r"^a compressor is not exchanged with a sync_delay: build the optimizer anew$",
    ),
    "within a round": (
        *(lambda p: LocalSteps(sgd(p), sync_every=3, w2s=FIRST, streaming=True), 4, (TopK(0.1),)),
        r"^a compressor is not exchanged after step 4, in a round in which some layers were sent: ",
    ),
    "without feedback": (
        *ALL_LOSSLESS,
        *((TopK(0.1),), r"^w2s=top 10% is not allowed after lossless messages, which leave no fe"),
    ),
    "no compressor, without feedback": (*ALL_LOSSLESS, (None,), r"^w2s=None is not allowed: give"),
    "mute": (
        *(lambda p: LocalSteps(sgd(p), sync_every=2, w2s=FIRST, mean="senders"), 2, (Mute(),)),
        r"^mean='senders' is not allowed with w2s=mute, which does not say which entries ",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_continue_is_refused_and_nothing_changes(case):
    make, steps, given, message = REFUSED[case]
    model = layer()
    optimizer = make(list(model.parameters()))
    take_steps(model, optimizer, steps)
    other_model, other = copy.deepcopy((model, optimizer))
    with pytest.raises(ValueError, match=message) as error:
        optimizer.exchange_compressor(*given)
    assert "\n" not in str(error.value)
    take_steps(model, optimizer, 3, first=steps)
    take_steps(other_model, other, 3, first=steps)
    assert everything(model, optimizer) == everything(other_model, other)


def test_one_that_is_put_into_a_group_is_refused_by_the_next_step():
    model, optimizer = trained("ef21", 1)
    optimizer.param_groups[0]["w2s"] = TopK(0.1)
    with pytest.raises(RuntimeError, match="built with top 20%: call exchange_compressor on all"):
        take_steps(model, optimizer, 1)
