"""LocalSteps in one process: what it equals, what it keeps apart, and what it refuses."""

import copy
import io
import pickle

import pytest
import torch
from cases import case
from torch import nn

from ef21_muon import ALONE, EF21Muon, LocalSteps
from ef21_muon.compressors import Quantize, RankK, TopK

INNER = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
    "adamw": lambda params: torch.optim.AdamW(params, lr=0.01),
    "ef21_muon": lambda params: EF21Muon(params, lr=0.02, process_group=ALONE),
    "nadam": lambda params: torch.optim.NAdam(params, lr=0.01),
}


def new_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))


def train(model, optimizer, steps, first=0):
    """Returns the model's parameters after every step."""
    seen = []
    for step in range(first, first + steps):
        inputs = torch.randn(16, 6, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model(inputs).sub(inputs[:, :4].sin()).square().mean().backward()
        optimizer.step()
        seen.append(parameters_of(model))
    return seen


def parameters_of(model):
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def build(inner="sgd", **options):
    model = new_model()
    return model, LocalSteps(INNER[inner](model.named_parameters()), **options)


@pytest.mark.parametrize("sync_every", [1, 3])
@pytest.mark.parametrize("inner", INNER)
def test_a_worker_alone_is_its_inner_optimizer_bit_for_bit(inner, sync_every):
    model, optimizer = build(inner, sync_every=sync_every)
    expected = new_model()
    for found, its in zip(
        train(model, optimizer, 6),
        train(expected, INNER[inner](expected.named_parameters()), 6),
        strict=True,
    ):
        assert torch.equal(found, its)
    with optimizer.global_params():
        assert torch.equal(parameters_of(model), parameters_of(expected))


@pytest.mark.parametrize(
    ("sync_every", "lengths"),
    [(5, [5, 5, 5, 5]), ({0: 8, 16: 2}, [8, 8, 2, 2]), ({0: 1, 1: 6}, [1, 6])],
)
def test_lookahead_of_a_worker_alone(sync_every, lengths):
    """Momentum outside, K = 1 of MuLoCo: torch.optim.SGD with Nesterov on W - x."""
    model, optimizer = build("adamw", sync_every=sync_every, outer_lr=0.7, outer_momentum=0.6)
    expected, its_inner = new_model(), None
    its_inner = INNER["adamw"](expected.named_parameters())
    outer_model = copy.deepcopy(expected)
    outer = torch.optim.SGD(outer_model.parameters(), lr=0.7, momentum=0.6, nesterov=True)
    for round, length in enumerate(lengths):
        assert optimizer.round == round
        train(model, optimizer, length, first=sum(lengths[:round]))
        train(expected, its_inner, length, first=sum(lengths[:round]))
        for theirs, mine in zip(outer_model.parameters(), expected.parameters(), strict=True):
            theirs.grad = theirs.detach() - mine.detach()
        outer.step()
        expected.load_state_dict(outer_model.state_dict())
        torch.testing.assert_close(parameters_of(model), parameters_of(expected))


def test_schedulers_act_on_the_inner_lr():
    model, optimizer = build("sgd", sync_every=2)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    for _ in range(3):
        train(model, optimizer, 1)
        scheduler.step()
    assert [group["lr"] for group in optimizer.inner[0].param_groups] == [0.1 * 0.5**3]


def test_several_inner_optimizers_share_the_work():
    model = new_model()
    weights = [(n, p) for n, p in model.named_parameters() if p.ndim == 2]
    biases = [(n, p) for n, p in model.named_parameters() if p.ndim == 1]
    optimizer = LocalSteps([INNER["ef21_muon"](weights), INNER["adamw"](biases)], sync_every=2)
    before = parameters_of(model)
    train(model, optimizer, 2)
    assert (parameters_of(model) != before).all()
    assert len(optimizer.param_groups) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"w2s": TopK(0.2), "s2w": RankK(0.5), "streaming": True}])
def test_global_params_swaps_w_in_and_x_back(options, dtype):
    model = new_model().to(dtype)
    optimizer = LocalSteps(torch.optim.SGD(model.parameters(), lr=0.1), sync_every=4, **options)
    start = parameters_of(model)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.ones(3, 6, dtype=dtype)).square().sum().backward()
        optimizer.step()
        local = parameters_of(model)
        with optimizer.global_params():
            if not options:
                assert torch.equal(parameters_of(model), start)
            with pytest.raises(RuntimeError, match=r"step\(\) within global_params"):
                optimizer.step()
            with (
                pytest.raises(RuntimeError, match="within global_params"),
                optimizer.global_params(),
            ):
                pass
        assert torch.equal(parameters_of(model), local)
        with pytest.raises(ZeroDivisionError), optimizer.global_params():
            raise ZeroDivisionError
        assert torch.equal(parameters_of(model), local)


@pytest.mark.parametrize(
    ("inner", "steps"), [*zip(INNER, (4, 6, 0, 3), strict=True), ("ef21_muon", 4)]
)
def test_a_saved_state_resumes_bit_for_bit(inner, steps):
    options = {"sync_every": 4, "w2s": TopK(0.3, "natural"), "s2w": Quantize("normal3")}
    options |= {"sync_delay": 2, "outer_momentum": 0.5, "streaming": True, "feedback": "ef21"}
    model, optimizer = build(inner, **options)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)
    for step in range(steps):
        train(model, optimizer, 1, first=step)
        scheduler.step()
    file = io.BytesIO()
    torch.save((model.state_dict(), optimizer.state_dict()), file)
    file.seek(0)
    others, other = build(inner, **options)
    saved_model, saved = torch.load(file, weights_only=True)
    others.load_state_dict(saved_model)
    other.load_state_dict(saved)
    its_scheduler = torch.optim.lr_scheduler.LambdaLR(
        other, lambda step: 0.9**step, last_epoch=steps - 1 if steps else -1
    )
    for step in range(steps, steps + 7):
        for one, its_optimizer, schedule in (
            (model, optimizer, scheduler),
            (others, other, its_scheduler),
        ):
            train(one, its_optimizer, 1, first=step)
            schedule.step()
        assert torch.equal(parameters_of(model), parameters_of(others))
    assert optimizer.traffic == other.traffic


ONE = {"outer_momentum": 0.5}
OTHER = {"s2w": Quantize("int8")}


@pytest.mark.parametrize(
    ("options", "bytes_an_entry"),
    [
        ({}, 8),  # W and e_j
        (ONE, 12),  # and V
        (OTHER, 12),  # or e_s
        (ONE | OTHER, 16),
        ({"feedback": "ef21"}, 12),  # W, G_j and G
        ({"sync_delay": 1}, 16),  # W, e_j, x_j and the message
    ],
)
def test_memory_is_as_documented(options, bytes_an_entry):
    model, optimizer = build(sync_every=3, **options)
    train(model, optimizer, 7)
    tensors = [t.untyped_storage() for state in optimizer.state.values() for t in state.values()]
    held = {storage.data_ptr(): storage.nbytes() for storage in tensors}
    assert sum(held.values()) == bytes_an_entry * parameters_of(model).numel()


def test_before_the_first_step_there_is_nothing_to_finish():
    model, optimizer = build(w2s=TopK(0.2))
    start = parameters_of(model)
    optimizer.final_sync()
    assert torch.equal(parameters_of(model), start) and optimizer.w2s_bytes == 0


def test_a_state_from_before_replaces_messages_under_way():
    options = {"sync_every": 4, "w2s": TopK(0.3), "sync_delay": 2, "outer_momentum": 0.5}
    model, optimizer = build(**options)
    train(model, optimizer, 2)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    expected = train(model, optimizer, 8, first=2)
    train(model, optimizer, 2)  # to where messages are under way
    model.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    for found, its in zip(train(model, optimizer, 8, first=2), expected, strict=True):
        assert torch.equal(found, its)


@pytest.mark.parametrize("streaming", [False, True])
def test_agreement_is_checked_while_all_layers_are_under_way_and_at_the_end(streaming):
    model, optimizer = build(
        sync_every=4, w2s=TopK(0.3), feedback="ef21", sync_delay=2, streaming=streaming
    )
    late = set()
    for step in range(10):
        train(model, optimizer, 1, first=step)
        optimizer.check_agreement()
        late.add(len(optimizer.under_way))
    assert 0 in late and (streaming or max(late) == len(optimizer.batches))
    optimizer.final_sync()
    optimizer.check_agreement()
    assert optimizer.under_way == []


def test_groups_may_have_compressors_of_their_own():
    model = new_model()
    groups = [
        {"params": model[0].parameters(), "name": "first"},
        {"params": model[2].parameters(), "name": "last"},
    ]
    w2s = {"first": TopK(0.2), "last": Quantize("normal2")}
    optimizer = LocalSteps(torch.optim.SGD(groups, lr=0.1), sync_every=1, w2s=w2s)
    used = {str(batch.up.compressor) for batch in optimizer.batches if batch.shape[1] > 1}
    assert used == {"top 20%", "quantize normal2"}
    with pytest.raises(ValueError, match="none for the group 'last'"):
        LocalSteps(torch.optim.SGD(groups, lr=0.1), w2s={"first": TopK(0.2)})


def test_watched_messages_are_known_when_all_are_sent():
    model, optimizer = build(sync_every=4, w2s=TopK(0.3), s2w=Quantize("normal2"), streaming=True)
    optimizer.watch = True
    watched = []
    for step in range(4):
        train(model, optimizer, 1, first=step)
        watched.append(optimizer.watched)
    assert watched == [False, False, False, True]
    layers = optimizer.diagnostics()
    assert layers.keys() == dict(model.named_parameters()).keys()
    for row in layers.values():
        assert 0 < row["w2s_contraction"] <= 1
        assert row["estimator_error"] == pytest.approx(
            (1 - row["w2s_contraction"]) ** 0.5, abs=1e-5
        )


def test_a_parameter_that_is_not_finite_is_named():
    model, optimizer = build("adamw", sync_every=4)
    train(model, optimizer, 3)
    optimizer.check_finite()
    model[0].weight.grad[0, 0] = float("nan")
    optimizer.step()
    with pytest.raises(FloatingPointError, match=r"0\.weight is not finite after step 4"):
        optimizer.check_finite()


class Counting(torch.optim.SGD):
    """Its state has a whole number, as those of some older optimizers."""

    def step(self, closure=None):
        super().step(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["steps"] = 1


WRONG = (
    ({"sync_every": 0}, "sync_every=0 is not allowed: give a whole number above 0"),
    ({"sync_every": 2.5}, "sync_every=2.5 is not allowed"),
    ({"sync_every": True}, "sync_every=True is not allowed"),
    (
        {"sync_every": 3, "sync_delay": 3},
        "sync_delay=3 is not allowed with sync_every=3: .* give at most 2",
    ),
    (
        {"sync_every": 3, "sync_delay": -1},
        "sync_delay=-1 is not allowed: give a whole number of at least 0",
    ),
    ({"outer_lr": 0}, "outer_lr=0 is not allowed: give a number above 0"),
    ({"outer_lr": float("nan")}, "outer_lr=nan is not allowed"),
    ({"outer_momentum": 1}, "outer_momentum=1 is not allowed: give a number of at least 0, be"),
    ({"error_decay": 1.1}, "error_decay=1.1 is not allowed"),
    ({"error_decay": 0.9, "feedback": "none"}, "error_decay=0.9 is not allowed with feedback="),
    ({"error_decay": 0.9, "feedback": "ef21"}, "error_decay=0.9 is not allowed with feedback="),
    ({"feedback": "ef22"}, "feedback='ef22' is not allowed: choose ef21, ef14, none"),
    ({"mean": "median"}, "mean='median' is not allowed: choose all, senders"),
    ({"mean": "senders", "feedback": "ef21"}, "mean='senders' is not allowed with feedback='ef21'"),
    ({"server": "cloud"}, "server='cloud' is not a placement"),
    ({"server": "replicated", "s2w": TopK(0.1)}, "sends nothing back to compress"),
    ({"w2s": "topk"}, "w2s='topk' lacks its fraction: write topk:FRACTION"),
    ({"streaming": 1}, "streaming=1 is not allowed: give True or False"),
    ({"nesterov": "yes"}, "nesterov='yes' is not allowed"),
    ({"buckets": 0}, "buckets=0 is not allowed"),
)


@pytest.mark.parametrize(("options", "message"), WRONG, ids=[message for _, message in WRONG])
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        build(**options)


def test_wrong_inner_optimizers_are_refused(process_group):
    model, optimizer = build()
    for inner, message in (
        (optimizer, "inner=LocalSteps is not allowed"),
        (model, "inner=Sequential is not allowed: give a torch optimizer"),
        (torch.optim.LBFGS(model.parameters()), "inner=LBFGS needs a closure in every step"),
    ):
        with pytest.raises(ValueError, match=message):
            LocalSteps(inner if isinstance(inner, torch.optim.Optimizer) else [inner])
    with pytest.raises(ValueError, match="more than one parameter group"):
        LocalSteps([INNER["sgd"](model.parameters()), INNER["adamw"](model.parameters())])


def test_inner_state_that_is_not_of_float_tensors_is_refused():
    model = new_model()
    optimizer = LocalSteps(Counting(model.parameters(), lr=0.1))
    with pytest.raises(ValueError, match="the state 'steps' of inner=Counting is of type int"):
        train(model, optimizer, 1)


def test_an_inner_optimizer_of_other_parameters_is_noticed():
    model = new_model()
    optimizer = LocalSteps(torch.optim.SGD(new_model().parameters(), lr=0.1))
    with pytest.raises(RuntimeError, match="none of the inner optimizer's parameters has a grad"):
        train(model, optimizer, 1)


def test_a_state_of_other_layers_is_refused():
    _, optimizer = build()
    other = LocalSteps(torch.optim.SGD(nn.Linear(3, 3).named_parameters(), lr=0.1))
    with pytest.raises(
        ValueError, match=r"^the state is of shape of weight of group 0 'not there'"
    ):
        other.load_state_dict(optimizer.state_dict())


WITHIN = {
    "step()": lambda model, optimizer: optimizer.step(),
    "global_params()": lambda model, optimizer: optimizer.global_params().__enter__(),
    "final_sync()": lambda model, optimizer: optimizer.final_sync(),
    "state_dict()": lambda model, optimizer: optimizer.state_dict(),
    "a state of all": lambda model, optimizer: optimizer.full_state_dict(),
    "load_state_dict()": lambda model, optimizer: optimizer.load_state_dict({}),
    "a copy": lambda model, optimizer: copy.copy(optimizer),
    "a deep copy": lambda model, optimizer: copy.deepcopy(optimizer),
    "a copy of both": lambda model, optimizer: copy.deepcopy((model, optimizer)),
    "a pickle": lambda model, optimizer: pickle.dumps(optimizer),
    "check_agreement()": lambda model, optimizer: optimizer.check_agreement(),
    "diagnostics()": lambda model, optimizer: optimizer.diagnostics(),
    "an inner step": lambda model, optimizer: optimizer.inner[0].step(),
    "a scheduled step": lambda model, optimizer: torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: 1.0
    ).optimizer.step(),
}


@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize("inner", ["adamw", "ef21_muon"])
def test_what_is_of_local_models_is_refused_while_the_parameters_are_w(inner, copied):
    """And nothing has changed after it."""
    options = {"sync_every": 4, "w2s": TopK(0.3), "s2w": Quantize("normal3"), "outer_momentum": 0.5}
    model, optimizer = build(inner, **options)
    train(model, optimizer, 6)
    if copied:
        model, optimizer = copy.deepcopy((model, optimizer))
    expected = copy.deepcopy((model, optimizer))
    line = r"within global_params\(\): the parameters are W there, leave it first"
    for step, (name, call) in enumerate(WITHIN.items(), start=6):
        with case(name):
            with optimizer.global_params(), pytest.raises(RuntimeError, match=line):
                call(model, optimizer)
            after = train(model, optimizer, 1, first=step)
            assert torch.equal(*after, *train(*expected, 1, first=step))


def test_two_lines_make_a_checkpoint_that_resumes(tmp_path):
    """README's, also in the middle of a round and with W saved for users before."""
    model, optimizer = build("adamw", sync_every=4, w2s=TopK(0.3), outer_momentum=0.5)
    train(model, optimizer, 6)
    with optimizer.global_params():
        torch.save(model.state_dict(), tmp_path / "model.pt")
    torch.save((model.state_dict(), optimizer.state_dict()), tmp_path / "worker0.pt")
    others, other = build("adamw", sync_every=4, w2s=TopK(0.3), outer_momentum=0.5)
    for target, saved in zip((others, other), torch.load(tmp_path / "worker0.pt"), strict=True):
        target.load_state_dict(saved)
    assert all(map(torch.equal, train(others, other, 7, 6), train(model, optimizer, 7, 6)))
