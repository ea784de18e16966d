"""Dion and DeMo in one process: their manners as torch optimizers."""

import io

import pytest
import torch
from one_layer import tables
from torch.utils._python_dispatch import TorchDispatchMode

from baselines import DeMo, Dion
from model import GPT, GPTConfig

KINDS = {"dion": Dion, "demo": DeMo}
SHAPES = {"query": (12, 20), "key": (12, 20), "kernel": (8, 3, 5), "bias": (15,), "scale": ()}
VALUES = ("float32", "int8", "natural4", "sign")
every_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


def random_tensors(seed):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def build(kind, dtype=torch.float32, shapes=SHAPES, **options):
    """Parameters by name and their optimizer."""
    start = random_tensors(seed=0)
    parameters = {name: torch.nn.Parameter(start[name].to(dtype)) for name in shapes}
    return parameters, kind(parameters.items(), **options)


def set_gradients(parameters, seed):
    gradients = random_tensors(seed)
    for name, parameter in parameters.items():
        parameter.grad = gradients[name].to(parameter.dtype)


@every_kind
def test_the_loss_of_a_small_gpt_falls(kind):
    """It learns to repeat 4 of 16 letters: from ln 16 to below ln 2."""
    model = GPT(GPTConfig(layers=1, width=32, heads=2, context=16, vocab_size=16))
    groups = [
        {"name": "hidden", "params": model.blocks.named_parameters()},
        {"name": "embedding", "params": [("embedding", model.embedding.weight)]},
    ]
    optimizer = kind(groups, lr=0.03)
    tokens = torch.tensor([3, 1, 4, 15]).repeat(4, 5)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = model(tokens[:, :16], tokens[:, 1:17])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 2.5
    assert losses[-1] < 0.7


@pytest.mark.parametrize("values", VALUES)
@every_kind
def test_a_loaded_state_continues_bit_for_bit(kind, values):
    parameters, optimizer = build(kind, lr=0.3, values=values, seed=3)
    for step in range(4):
        set_gradients(parameters, step)
        optimizer.step()
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    other, other_optimizer = build(kind, lr=0.1, values=values, seed=5)
    with torch.no_grad():
        for mine, its in zip(parameters.values(), other.values(), strict=True):
            its.copy_(mine)
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
    assert optimizer.w2s_bytes == other_optimizer.w2s_bytes > 0


@pytest.mark.parametrize(
    ("kind", "other"),
    [
        (Dion, {"shapes": ["query", "key"]}),
        (Dion, {"shapes": [*list(SHAPES)[1:], "query"]}),
        (Dion, {"rank_fraction": 0.5}),
        (DeMo, {"shapes": ["query", "key"]}),
        (DeMo, {"shapes": [*list(SHAPES)[1:], "query"]}),
    ],
)
def test_a_state_that_does_not_fit_is_refused(kind, other):
    _, optimizer = build(kind)
    others, other_optimizer = build(kind, **other)
    before = tables(other_optimizer)
    set_gradients(others, seed=1)
    with pytest.raises(ValueError, match=r"^the state (holds|is of) .*: build "):
        other_optimizer.load_state_dict(optimizer.state_dict())
    after = tables(other_optimizer)
    assert all(torch.equal(before[i][key], after[i][key]) for i in before for key in before[i])


WRONG = [
    *((kind, "lr", value) for kind in KINDS.values() for value in (-1e-9, float("nan"), "fast")),
    *((kind, "weight_decay", value) for kind in KINDS.values() for value in (-1, float("inf"))),
    *((kind, "values", "float8") for kind in KINDS.values()),
    *((Dion, "mu", value) for value in (-0.1, 1.0, None)),
    *((Dion, "rank_fraction", value) for value in (0, 1.01, "0.5")),
    *((Dion, "lion_lr", value) for value in (-1.0, "fast")),
    *((Dion, "lion_betas", value) for value in (0.9, (0.9,), (0.9, 1.0), (-0.1, 0.9))),
    *((DeMo, "decay", value) for value in (-0.1, 1.0)),
    *((DeMo, name, value) for name in ("k", "chunk") for value in (0, -3, 2.0, True)),
]


@pytest.mark.parametrize(("kind", "option", "value"), WRONG)
def test_impossible_options_are_refused(kind, option, value):
    with pytest.raises(ValueError, match=f"{option}=.* is not a") as error:
        build(kind, **{option: value})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("kind", "option", "wrong"),
    [
        *((kind, "lr", -1.0) for kind in KINDS.values()),
        *((kind, "weight_decay", -1.0) for kind in KINDS.values()),
        (Dion, "mu", 1.0),
        (Dion, "algorithm", "adamw"),
        (Dion, "lion_betas", (0.9, 1.0)),
        (DeMo, "decay", 1.0),
    ],
)
def test_options_of_a_group_are_checked(kind, option, wrong):
    with pytest.raises(ValueError, match=f"{option}=.* is not allowed"):
        kind([{"params": [torch.nn.Parameter(torch.ones(3))], option: wrong}])


@every_kind
def test_later_groups_and_empty_parameters_are_refused(kind):
    _, optimizer = build(kind)
    with pytest.raises(RuntimeError, match="all groups"):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(3))]})
    with pytest.raises(ValueError, match="no entries"):
        kind([torch.nn.Parameter(torch.ones(0, 3))])


@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@every_kind
def test_a_gradient_that_is_not_finite_is_named(kind, value, values):
    parameters, optimizer = build(kind, values=values)
    for step in range(1, 6):
        set_gradients(parameters, step)
        if step in (3, 5):
            parameters["key"].grad[2, 3] = value
        if step == 4:
            parameters["bias"].grad[0] = value
        optimizer.step()
        if step < 3:
            optimizer.check_finite()
        else:
            with pytest.raises(FloatingPointError, match=r"gradient of key .* step 3:"):
                optimizer.check_finite()


@every_kind
def test_a_missing_gradient_is_named_before_anything_changes(kind):
    parameters, optimizer = build(kind)
    set_gradients(parameters, seed=1)
    parameters["kernel"].grad = None
    with pytest.raises(RuntimeError, match="kernel has no gradient"):
        optimizer.step()
    assert not any(state["momentum"].any() for state in optimizer.state.values())


@every_kind
def test_one_process_hands_nothing_to_the_network(kind):
    parameters, optimizer = build(kind)
    set_gradients(parameters, seed=1)
    optimizer.step()
    assert optimizer.w2s_bytes > 0
    assert optimizer.wire_tx_bytes == 0


@pytest.mark.parametrize("values", VALUES)
@every_kind
def test_bfloat16_parameters_have_float32_state(kind, values):
    parameters, optimizer = build(kind, torch.bfloat16, values=values)
    exact, exact_optimizer = build(kind, values=values)
    for seed in (1, 2):
        set_gradients(parameters, seed)
        for name, parameter in exact.items():
            parameter.grad = parameters[name].grad.float()
        optimizer.step()
        exact_optimizer.step()
    for name, parameter in parameters.items():
        assert parameter.dtype == torch.bfloat16
        state, exact_state = optimizer.state[parameter], exact_optimizer.state[exact[name]]
        for key, tensor in exact_state.items():
            assert torch.equal(state[key], tensor)
        torch.testing.assert_close(parameter.float(), exact[name], rtol=2**-6, atol=2**-6)


@every_kind
def test_the_phases_are_timed(kind):
    parameters, optimizer = build(kind)
    set_gradients(parameters, seed=1)
    optimizer.step()
    assert set(optimizer.timer.read()) == {"encode", "exchange", "server", "decode"}


@every_kind
def test_a_closure_gives_the_loss(kind):
    parameters, optimizer = build(kind, shapes=["query"])

    def closure():
        loss = parameters["query"].square().sum()
        loss.backward()
        return loss

    expected = parameters["query"].square().sum().item()
    assert optimizer.step(closure).item() == pytest.approx(expected)


class NoHostSync(TorchDispatchMode):
    """Fails on operations whose result the host waits for."""

    waiting = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "unique2")

    def __torch_dispatch__(self, operation, types, arguments=(), options=None):
        name = operation.overloadpacket.__name__
        assert name not in self.waiting, f"{name} makes the host wait"
        return operation(*arguments, **(options or {}))


@pytest.mark.parametrize("values", VALUES)
@every_kind
def test_a_step_never_waits_for_the_device(kind, values):
    parameters, optimizer = build(kind, values=values)
    for seed in (1, 2):
        set_gradients(parameters, seed)
        with NoHostSync():
            optimizer.step()
