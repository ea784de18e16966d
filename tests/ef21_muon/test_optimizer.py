"""EF21Muon in one process: its error feedback, and its manners as a torch optimizer."""

import io
from math import inf, nan

import pytest
import torch
from one_worker import SHAPES, build, copies, set_gradients
from torch.utils._python_dispatch import TorchDispatchMode

from ef21_muon import EF21Muon, WorkerMesh
from ef21_muon.compressors import Identity, Quantize, QuantizedRank, RankK, TopK, selection
from ef21_muon.norms import L1, AdaptiveRadius, ColumnNorm, Sign, Spectral
from ef21_muon.values import Natural

COMPRESSORS = {
    "identity": Identity(),
    "bfloat16": Quantize("bfloat16"),
    "natural": Quantize("natural"),
    "nearest": Quantize(Natural(rounding="nearest")),
    "topk": TopK(0.2),
    "topk natural": TopK(0.2, "natural"),
    "rank": RankK(0.2),
    "rank natural": RankK(0.2, "natural"),
    "quantized rank": QuantizedRank(0.2),
}
every_compressor = pytest.mark.parametrize("compressor", COMPRESSORS.values(), ids=COMPRESSORS)


def states(parameters, optimizer, key):
    return [optimizer.state[parameter][key].clone() for parameter in parameters.values()]


@every_compressor
def test_the_first_momentum_is_the_gradient(compressor):
    parameters, optimizer = build(momentum=0.9, w2s=compressor)
    set_gradients(parameters, seed=1)
    optimizer.step()
    for parameter, momentum in zip(
        parameters.values(), states(parameters, optimizer, "momentum"), strict=True
    ):
        assert torch.equal(momentum, parameter.grad.reshape(momentum.shape))


@every_compressor
def test_the_gradient_estimate_changes_every_round(compressor):
    parameters, optimizer = build(w2s=compressor)
    before = states(parameters, optimizer, "gradient_estimate")
    assert not any(estimate.any() for estimate in before)
    for seed in range(3):
        set_gradients(parameters, seed)
        optimizer.step()
        after = states(parameters, optimizer, "gradient_estimate")
        assert not any(torch.equal(old, new) for old, new in zip(before, after, strict=True))
        before = after


def test_the_gradient_estimate_converges_to_a_constant_gradient():
    """At the rate of TopK's contraction, here 1 - 1/5 in squares."""
    parameters, optimizer = build(w2s=TopK(0.2))
    set_gradients(parameters, seed=1)
    for count in range(1, 21):
        optimizer.step()
        for parameter, estimate in zip(
            parameters.values(), states(parameters, optimizer, "gradient_estimate"), strict=True
        ):
            missing = (estimate - parameter.grad.reshape(estimate.shape)).norm()
            assert missing <= 1.01 * 0.8 ** (count / 2) * parameter.grad.norm()
    set_gradients(parameters, seed=2)
    optimizer.step()
    assert optimizer.state[parameters["query"]]["gradient_estimate"].count_nonzero() == 12 * 20


def test_s2w_keeps_the_servers_model_apart_but_near():
    """A step is at most 1.21 sqrt(d_out / d_in) lr sqrt(rank) long; C keeps 1/5 of X - W."""
    lr, rest = 0.1, 0.8**0.5
    parameters, optimizer = build(lr=lr, s2w=TopK(0.2))
    for seed in range(20):
        set_gradients(parameters, seed)
        optimizer.step()
        for name in ("query", "key", "kernel", "bias"):
            server_model = optimizer.state[parameters[name]]["server_model"]
            d_out, d_in = server_model.shape
            apart = (server_model - parameters[name].detach().view(d_out, d_in)).norm()
            step = 1.21 * lr * (d_out / d_in * min(d_out, d_in)) ** 0.5
            assert 0 < apart <= step * rest / (1 - rest)
    optimizer.param_groups[0]["lr"] = 0.0
    lossy = {name: parameter for name, parameter in parameters.items() if name != "scale"}
    server_models = states(lossy, optimizer, "server_model")
    for _ in range(60):
        optimizer.step()
    for parameter, server_model in zip(lossy.values(), server_models, strict=True):
        torch.testing.assert_close(parameter.detach().view_as(server_model), server_model)
    assert "server_model" not in optimizer.state[parameters["scale"]], "one entry is quantized"


@pytest.mark.parametrize("norm", [Spectral(), Sign()])
def test_schedulers_set_the_radius(norm):
    parameters, optimizer = build(lr=0.5, radius=3.0, momentum=0, norm=norm)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: [1.0, 0.1, 0.0][step])
    set_gradients(parameters, seed=1)
    for factor in (1.0, 0.1):
        before = copies(parameters)
        optimizer.step()
        scheduler.step()
        for old, new in zip(before, parameters.values(), strict=True):
            matrix = new.grad.reshape(len(new) if new.ndim else 1, -1)
            expected = 0.5 * 3.0 * factor * norm.lmo(matrix).view_as(new)
            torch.testing.assert_close(new.detach() - old, expected, rtol=1e-4, atol=1e-5)
    before = copies(parameters)
    optimizer.step()
    for old, new in zip(before, parameters.values(), strict=True):
        assert torch.equal(old, new)


def test_a_closure_is_called_once_with_gradients_enabled():
    parameters, optimizer = build()
    calls = []

    def closure():
        optimizer.zero_grad()
        loss = sum(parameter.square().sum() for parameter in parameters.values())
        loss.backward()
        calls.append(loss.item())
        return loss

    first, second = optimizer.step(closure), optimizer.step(closure)
    assert calls == [first.item(), second.item()]
    assert second < first


@pytest.mark.parametrize("s2w", [Identity(), TopK(0.2)])
def test_bfloat16_parameters_have_float32_state(s2w):
    parameters, optimizer = build(torch.bfloat16, w2s=TopK(0.5), s2w=s2w)
    exact, exact_optimizer = build(w2s=TopK(0.5), s2w=s2w)
    for seed in (1, 2):
        set_gradients(parameters, seed)
        for name, parameter in exact.items():
            parameter.grad = parameters[name].grad.float()
        optimizer.step()
        exact_optimizer.step()
    for name, parameter in parameters.items():
        assert parameter.dtype == torch.bfloat16
        state, exact_state = optimizer.state[parameter], exact_optimizer.state[exact[name]]
        assert {tensor.dtype for tensor in state.values()} == {torch.float32}
        for key in ("momentum", "gradient_estimate", "server_gradient"):
            assert torch.equal(state[key], exact_state[key])
        torch.testing.assert_close(parameter.float(), exact[name], rtol=2**-7, atol=2**-7)


@pytest.mark.parametrize(
    ("name", "value"),
    [*((name, nan) for name in COMPRESSORS), ("topk", inf), ("rank", -inf), ("nearest", inf)],
)
def test_a_gradient_that_is_not_finite_is_named(name, value):
    compressor = COMPRESSORS[name]
    parameters, optimizer = build(w2s=compressor, s2w=compressor)
    for step in range(1, 6):
        set_gradients(parameters, step)
        if step == 3:
            parameters["key"].grad[2, 3] = value
        if step == 4:
            parameters["bias"].grad[0] = value
        optimizer.step()
        if step < 3:
            optimizer.check_finite()
        else:
            with pytest.raises(FloatingPointError, match=r"gradient of key .* step 3:"):
                optimizer.check_finite()


def test_a_missing_gradient_is_named():
    parameters, optimizer = build()
    set_gradients(parameters, seed=1)
    parameters["kernel"].grad = None
    with pytest.raises(RuntimeError, match="kernel has no gradient"):
        optimizer.step()


RULES = {
    "natural": {"w2s": Quantize("natural"), "s2w": Identity()},
    "rank": {"w2s": RankK(0.2, "natural"), "s2w": TopK(0.2, "natural")},
    "both rank": {"w2s": RankK(0.2), "s2w": RankK(0.2), "norm": Sign(), "momentum": 0.5},
}


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_a_loaded_state_continues_bit_for_bit(rule):
    parameters, optimizer = build(lr=0.3, seed=3, **rule)
    for step in range(4):
        set_gradients(parameters, step)
        optimizer.step()
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    other, other_optimizer = build(lr=0.1, seed=5, **rule)
    with torch.no_grad():
        for parameter, copy in zip(other.values(), copies(parameters), strict=True):
            parameter.copy_(copy)
    other_optimizer.load_state_dict(torch.load(file, weights_only=True))
    for step in range(4, 8):
        for model, its_optimizer in ((parameters, optimizer), (other, other_optimizer)):
            set_gradients(model, step)
            its_optimizer.step()
        for mine, its in zip(parameters.values(), other.values(), strict=True):
            assert torch.equal(mine, its)
    saved, loaded = optimizer.state_dict(), other_optimizer.state_dict()
    assert optimizer.steps == other_optimizer.steps == 8
    assert saved["param_groups"] == loaded["param_groups"]


@pytest.mark.parametrize(
    ("saved", "other"),
    [
        ({}, {"shapes": ["query", "key"]}),
        ({}, {"shapes": [*list(SHAPES)[1:], "query"]}),
        ({"shapes": ["scale"]}, {"shapes": ["bias"]}),
        ({}, {"s2w": TopK(0.2)}),
    ],
    ids=["fewer parameters", "other shapes", "one entry for many", "other compressor"],
)
def test_a_state_that_does_not_fit_is_refused(saved, other):
    _, optimizer = build(**saved)
    _, other_optimizer = build(**other)
    with pytest.raises(ValueError, match="state"):
        other_optimizer.load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *(("lr", value) for value in (-1e-9, float("nan"))),
        *(("radius", value) for value in (0, -1.0, float("nan"))),
        *(("momentum", value) for value in (1, -0.1, 1.001, float("nan"))),
        *(("norm", value) for value in ("spectral", Spectral, TopK(0.1))),
        *(("w2s", value) for value in ("topk", TopK, Natural(), 0.1)),
        *(("s2w", value) for value in ("topk", TopK, Natural(), 0.1)),
        ("server", "rank1"),
    ],
)
def test_impossible_options_are_refused(option, value):
    with pytest.raises(ValueError, match=option):
        build(**{option: value})


@pytest.mark.parametrize("option", ["lr", "radius", "momentum"])
def test_options_of_a_group_are_checked(option):
    build(lr=0.0, radius=1e-9, momentum=0)  # the edges are allowed
    for wrong in (-1.0, "0.1"):
        with pytest.raises(ValueError, match=f"{option}={wrong!r}"):
            EF21Muon([{"params": [torch.nn.Parameter(torch.ones(3))], option: wrong}])


def test_later_groups_and_empty_parameters_are_refused():
    _, optimizer = build()
    with pytest.raises(RuntimeError, match="all groups"):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(3))]})
    with pytest.raises(ValueError, match="no entries"):
        EF21Muon([torch.nn.Parameter(torch.ones(0, 3))])


MASKS = (torch.bool, torch.uint8)


class NoHostSync(TorchDispatchMode):
    """Fails on operations whose result the host waits for."""

    waiting = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2")
    indexing = ("index", "index_put", "index_put_", "_index_put_impl_")

    def __torch_dispatch__(self, operation, types, arguments=(), options=None):
        name = operation.overloadpacket.__name__
        assert name not in self.waiting, f"{name} makes the host wait"
        if name in self.indexing:  # by a mask, which has to be counted
            masks = [i for i in arguments[1] if i is not None and i.dtype in MASKS]
            assert not masks, f"{name} makes the host wait"
        return operation(*arguments, **(options or {}))


OPTIONS = {
    "nesterov and weight decay": {"nesterov": True, "weight_decay": 0.1},
    "adaptive radius": {"radius": AdaptiveRadius(0.5, 1.0)},
    **{name: {"feedback": name} for name in ("ef14", "none")},
    "decays": {"feedback": "ef14", "error_decay": 0.9, "server_momentum": 0.7},
    "other start": {"momentum_init": "zero", "first_message": "full"},
    **{repr(norm): {"norm": norm} for norm in (Spectral("polar_express"), ColumnNorm(), L1())},
}


def steps_without_waiting(parameters, optimizer):
    for seed in (1, 2):
        set_gradients(parameters, seed)
        with NoHostSync():
            optimizer.step()


@every_compressor
def test_a_step_never_waits_for_the_device(compressor):
    steps_without_waiting(*build(w2s=compressor, s2w=compressor))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_no_option_makes_a_step_wait_for_the_device(options):
    compressor = TopK(0.2, "natural")
    steps_without_waiting(*build(w2s=compressor, s2w=compressor, **options))


def test_nor_does_the_selection_in_large_layers(monkeypatch):
    monkeypatch.setattr(selection, "SORTED_BELOW", 0)
    steps_without_waiting(*build(w2s=TopK(0.2, "natural"), s2w=TopK(0.2)))


def test_nor_do_workers_of_several_ranks(process_group):
    parameters, _ = build()
    groups = [{"params": list(parameters.items())}]
    compressors = {"w2s": TopK(0.2, "natural"), "s2w": RankK(0.2)}
    mesh = WorkerMesh(parameters.values(), ranks_per_worker=1)
    optimizer = EF21Muon(groups, mesh=mesh, **compressors)
    steps_without_waiting(parameters, optimizer)


@pytest.mark.parametrize(
    "wait",
    [lambda x: x.sum().item(), lambda x: x[x > 0], lambda x: x.unique(), lambda x: x.nonzero()],
)
def test_the_guard_against_waiting_notices(wait):
    with NoHostSync(), pytest.raises(AssertionError, match="makes the host wait"):
        wait(torch.ones(3))
