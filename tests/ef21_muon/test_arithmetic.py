"""What workers compare before they start: the same numbers everywhere, and nothing is changed."""

from itertools import product

import pytest
import torch
from cases import case
from workers.unlike import COMPRESSORS, FORMATS, LOW_RANK

from ef21_muon.checks.arithmetic import SIDE, digests, of_inner, of_messages, of_norms
from ef21_muon.compressors import Identity, RankK, TopK
from ef21_muon.compressors.base import numbers
from ef21_muon.norms import AdaptiveRadius, Spectral


def parameter(*shape):
    return torch.nn.Parameter(torch.zeros(shape))


@pytest.mark.parametrize("kind", COMPRESSORS | LOW_RANK)
def test_samples_are_messages(kind):
    """Alike each time, whatever torch's own generator and defaults are."""
    for values, (m, n) in product(FORMATS, [(40, 24), (24, 40), (33, 1)]):
        with case(values, m, n):
            compressor = (COMPRESSORS | LOW_RANK)[kind](values)
            message = compressor.sample(m, n)
            assert message.shape == (1, compressor.payload_bytes(m, n))
            assert compressor.decode(message, m, n).isfinite().all()
            torch.rand(1)
            torch.set_default_dtype(torch.float64)
            try:
                assert torch.equal(compressor.sample(m, n), message)
            finally:
                torch.set_default_dtype(torch.float32)


def test_numbers_fill_a_mantissa_and_are_all_there():
    x = numbers(64, 64)
    assert x.dtype == torch.float32 and x.abs().max() > 1 << 22
    assert x.unique().numel() > 4000 and (x % 2 == 1).any()


def test_every_compressor_and_shape_is_tried_once():
    params = [parameter(30, 20), parameter(30, 20), parameter(2 * SIDE, 8)]
    groups = [
        {"params": params, "w2s": TopK(0.1)},
        {"params": [parameter(30, 20), parameter(8, 8)], "w2s": RankK(0.2)},
        {"params": [parameter(30, 20)], "w2s": RankK(0.2)},
        {"params": [parameter(5)], "w2s": Identity()},
    ]
    names = [name for name, _ in of_messages("w2s", groups)]
    assert names == [
        "w2s=top 10%, 30 x 20",
        f"w2s=top 10%, {2 * SIDE} x 8",
        "w2s=rank 20%, 30 x 20",
        "w2s=rank 20%, 8 x 8",
    ]


@pytest.mark.parametrize("radius", [1.0, AdaptiveRadius(1, 1)])
@pytest.mark.parametrize("feedback", [False, True])
def test_a_larger_matrix_is_tried_in_part(radius, feedback):
    group = {"params": [parameter(2 * SIDE, 8)], "norm": Spectral(), "radius": radius}
    ((name, step),) = of_norms([group | {"lmo_feedback": feedback}])
    assert name == f"step of Spectral(), {2 * SIDE} x 8 (group 0)"
    assert SIDE * 8 <= step.numel() <= SIDE * 8 + SIDE + 1


INNER = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1),
    "single": lambda p: torch.optim.AdamW(p, lr=0.1, foreach=False),
    "muon": lambda p: torch.optim.Muon(p, lr=0.1),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.1),
    "rprop": lambda p: torch.optim.Rprop(p, lr=0.1),
}


@pytest.mark.parametrize("make", INNER.values(), ids=INNER)
def test_an_inner_optimizer_is_as_it_was(make):
    """Before its first step and later, and its hooks are not called."""
    weight = parameter(6, 4)
    optimizer = make([weight])
    first = digests(of_inner([optimizer]))
    weight.grad = torch.ones_like(weight)
    torch.optim.lr_scheduler.ExponentialLR(optimizer, 1.0)
    optimizer.step()
    optimizer.register_step_pre_hook(lambda *arguments: pytest.fail("a hook was called"))
    before, kept = optimizer.state_dict(), weight.detach().clone()
    state = {key: value.clone() for key, value in before["state"][0].items()}
    assert digests(of_inner([optimizer])) == first and len(first) == 1
    assert torch.equal(weight, kept) and optimizer.param_groups[0]["params"][0] is weight
    for key, value in optimizer.state_dict()["state"][0].items():
        assert torch.equal(value, state[key])


class Own(torch.optim.SGD):
    """Of a user's."""


def test_optimizers_that_may_remember_elsewhere_are_left_out():
    sparse = torch.optim.SparseAdam([parameter(6, 4)])
    assert digests(of_inner([Own([parameter(6, 4)], lr=0.1), sparse])) == {}
