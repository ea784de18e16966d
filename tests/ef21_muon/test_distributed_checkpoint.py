"""States through torch.distributed.checkpoint; for ranks see workers/checkpoint_folders.py."""

import io
import pickle
from itertools import cycle

import pytest
import torch
import torch.distributed.checkpoint as dcp
from newer_torch import flattens_tables
from one_layer import layer, take_steps
from run import torchrun
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from workers.checkpoint_folders import (
    AFTER,
    BEFORE,
    CASES,
    groups_of,
    leaves,
    new_model,
    same,
    ways,
)

from ef21_muon import ALONE, AveragedGradients, EF21Muon, LocalSteps
from ef21_muon.compressors import RandK, TopK
from ef21_muon.norms import Spectral

FLAT = StateDictOptions(flatten_optimizer_state_dict=True)
OFFLOAD = StateDictOptions(cpu_offload=True)
FULL = StateDictOptions(full_state_dict=True)


class Model(nn.Module):
    """With two groups of parameters, a layer that gets no gradient, and running statistics."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 8))
        self.head = nn.Linear(8, 3)
        self.unused = nn.Linear(2, 2)

    def forward(self, x):
        return self.head(self.body(x).tanh())

    def split(self):
        return list(self.body.parameters()), list(self.head.parameters())


def groups(model):
    body, head = model.split()
    return [{"name": "body", "params": body}, {"name": "head", "params": head, "lr": 0.003}]


def adamw(model):
    unused = {"name": "unused", "params": list(model.unused.parameters()), "betas": (0.8, 0.9)}
    return torch.optim.AdamW([*groups(model), unused], lr=0.01)


def two_inner(model):
    body, head = model.split()
    muon = EF21Muon([{"name": "body", "params": body}], process_group=ALONE, nesterov=True)
    return [muon, torch.optim.SGD([{"name": "head", "params": head}], lr=0.1, momentum=0.9)]


MAKE = {
    "muon": lambda m: EF21Muon(groups(m), w2s=RandK(0.4), s2w="rank:0.5:natural"),
    "muon, full first": lambda m: EF21Muon(groups(m), w2s=TopK(0.3), first_message="full"),
    "buffers": lambda m: EF21Muon(groups(m), w2s=RandK(0.4), buffers=m),
    "named": lambda m: EF21Muon([(n, p) for n, p in m.named_parameters() if "unused" not in n]),
    "local muon": lambda m: LocalSteps(
        EF21Muon(groups(m), w2s=RandK(0.4), process_group=ALONE), 3, w2s=RandK(0.3)
    ),
    "local, under way": lambda m: LocalSteps(
        EF21Muon(groups(m), process_group=ALONE), 4, w2s=RandK(0.3), sync_delay=2, buffers=m
    ),
    "local adamw": lambda m: LocalSteps(adamw(m), 3, w2s=TopK(0.3), outer_momentum=0.5),
    "local, two inner": lambda m: LocalSteps(two_inner(m), 3, w2s=RandK(0.3), s2w=RandK(0.5)),
    "averaged": lambda m: AveragedGradients(
        adamw(m.requires_grad_()), w2s=RandK(0.4), missing_grad="zero"
    ),
    "averaged, lossless": lambda m: AveragedGradients(adamw(m), missing_grad="zero"),
}
STEPS = 5  # of 3 or 4 a round


def take(model, optimizer, first, last):
    for step in range(first, last):
        inputs = torch.randn(16, 6, generator=torch.Generator().manual_seed(step))
        model.zero_grad()
        model(inputs).square().mean().backward()
        for group in optimizer.param_groups:
            group["lr"] *= 0.9
        optimizer.step()


def build(name):
    torch.manual_seed(0)
    model = Model()
    return model, MAKE[name](model)


def states(model, optimizer, options=None):
    optim = get_optimizer_state_dict(model, optimizer, options=options)
    return {"model": get_model_state_dict(model), "optim": optim}


def through_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def through_folder(path):
    def through(saved, here):
        dcp.save(saved, checkpoint_id=path)
        dcp.load(here, checkpoint_id=path)
        return here

    return through


def alike(optimizer, other):
    """Whether they have the same state, bit for bit."""
    state, its = optimizer.state_dict(), other.state_dict()
    tensors, of_other = leaves("state", state["state"]), leaves("state", its["state"])
    return (
        str(state["param_groups"]) == str(its["param_groups"])
        and tensors.keys() == of_other.keys()
        and all(same(tensor, of_other[name]) for name, tensor in tensors.items())
    )


WAYS = {
    "in memory": (None, lambda path: lambda saved, here: saved),
    "file": (None, lambda path: lambda saved, here: through_file(saved)),
    "folder": (None, through_folder),
    "offload, folder": (OFFLOAD, through_folder),
    "full, folder": (StateDictOptions(full_state_dict=True, cpu_offload=True), through_folder),
    **({"flat folder": (FLAT, through_folder)} if flattens_tables() else {}),
}


# Each optimizer in one of the ways, every other one flat, which asks for the most.
FLAT_FIRST = "flat folder" if flattens_tables() else "folder"
OTHER_WAYS = cycle(["folder", "file", "full, folder", "offload, folder", "in memory"])
PAIRS = [(name, next(OTHER_WAYS) if place % 2 else FLAT_FIRST) for place, name in enumerate(MAKE)]


@pytest.mark.parametrize(("name", "way"), PAIRS)
def test_a_training_goes_on_bit_for_bit_in_another_model_and_optimizer(name, way, tmp_path):
    options, through = WAYS[way]
    model, optimizer = build(name)
    take(model, optimizer, 0, STEPS)
    saved = states(model, optimizer, options)
    other_model, other = build(name)
    state = through(tmp_path / "folder")(saved, states(other_model, other, options))
    set_model_state_dict(other_model, state["model"])
    set_optimizer_state_dict(other_model, other, state["optim"], options=options)
    assert other.steps == STEPS and other.traffic == optimizer.traffic
    take(model, optimizer, STEPS, 2 * STEPS)
    take(other_model, other, STEPS, 2 * STEPS)
    with optimizer.global_params(), other.global_params():
        ends, others = model.state_dict(), other_model.state_dict()
        assert all(torch.equal(ends[key], others[key]) for key in ends)
    assert other.traffic == optimizer.traffic
    assert alike(other, optimizer)


def test_optimizers_of_one_model_share_a_state(tmp_path):
    def build():
        torch.manual_seed(0)
        model = Model()
        body, head = groups(model)
        rest = torch.optim.AdamW([head], lr=0.01)
        return model, [EF21Muon([body], w2s=RandK(0.3)), AveragedGradients(rest, w2s=RandK(0.3))]

    def take(model, optimizers):
        for step in range(3):
            inputs = torch.randn(16, 6, generator=torch.Generator().manual_seed(step))
            model.zero_grad()
            model(inputs).square().mean().backward()
            for optimizer in optimizers:
                optimizer.step()

    (model, optimizers), (other_model, others) = build(), build()
    take(model, optimizers)
    state = through_folder(tmp_path)(states(model, optimizers), states(other_model, others))
    set_model_state_dict(other_model, state["model"])
    set_optimizer_state_dict(other_model, others, state["optim"])
    take(model, optimizers)
    take(other_model, others)
    assert str(model.state_dict()) == str(other_model.state_dict())
    for one, other in zip(optimizers, others, strict=True):
        assert alike(one, other)


OTHERS = {
    "momentum": lambda m: EF21Muon(groups(m), w2s=RandK(0.4), s2w="rank:0.5:natural", momentum=0.5),
    "w2s": lambda m: EF21Muon(groups(m), w2s=RandK(0.5), s2w="rank:0.5:natural"),
}


@pytest.mark.parametrize("options", [None, *([FLAT] if flattens_tables() else [])])
@pytest.mark.parametrize("name", OTHERS)
def test_a_folder_of_other_options_is_refused_before_anything_changes(name, options, tmp_path):
    model, optimizer = build("muon")
    take(model, optimizer, 0, 2)
    other = OTHERS[name](model)
    read = through_folder(tmp_path)(
        states(model, optimizer, options)["optim"], states(model, other, options)["optim"]
    )
    before = str(other.state_dict())
    with pytest.raises(ValueError, match=rf"^the state is of {name} of group 0 .*: build the opti"):
        set_optimizer_state_dict(model, other, read, options=options)
    assert str(other.state_dict()) == before


class Own(torch.optim.SGD):
    """Of a user's."""


def test_what_is_not_known_of_an_inner_optimizer_is_not_lost(tmp_path):
    """What others make in their first step is not known before it."""

    def build():
        model = layer()
        return model, LocalSteps(Own(model.parameters(), lr=0.1, momentum=0.9))

    (model, optimizer), (other_model, other) = build(), build()
    take_steps(model, optimizer, 2)
    state = through_folder(tmp_path)(states(model, optimizer), states(other_model, other))
    with pytest.raises(
        ValueError, match=r"^the state lacks what inner=Own remembers, .* a step be"
    ):
        set_optimizer_state_dict(other_model, other, state["optim"])
    take_steps(other_model, other, 1)
    dcp.load(state := states(other_model, other), checkpoint_id=tmp_path)
    set_optimizer_state_dict(other_model, other, state["optim"])
    assert alike(other, optimizer)


def test_a_state_is_not_read_while_the_parameters_are_w():
    model, optimizer = build("local adamw")
    with optimizer.global_params():
        for options in (None, FLAT, FULL):
            with pytest.raises(RuntimeError, match=r"^state_dict\(\) within global_params\(\)"):
                get_optimizer_state_dict(model, optimizer, options=options)


@pytest.mark.parametrize("kind", ["muon", "local muon", "local adamw", "averaged"])
def test_a_pickled_state_is_as_large_as_its_tensors(kind):
    """Not as the tables that its layers are rows of."""
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(48)))
    muon = EF21Muon(model.parameters(), process_group=ALONE, norm=Spectral())
    adamw = torch.optim.AdamW(model.parameters())
    optimizer = {
        "muon": lambda: muon,
        "local muon": lambda: LocalSteps(muon, w2s=TopK(0.1)),
        "local adamw": lambda: LocalSteps(adamw, w2s=TopK(0.1)),
        "averaged": lambda: AveragedGradients(adamw, w2s=TopK(0.1)),
    }[kind]()
    model(torch.randn(4, 64)).sum().backward()
    optimizer.step()
    of_all = [optimizer, *optimizer.inner]
    held = sum(t.nbytes for one in of_all for own in one.state.values() for t in own.values())
    for state in (optimizer.state_dict(), optimizer.full_state_dict()):
        assert held <= len(pickle.dumps(state)) <= 1.1 * held


RANKS = {"three": (3, 1), "mesh": (4, 2), "sharded mesh": (4, 2, "sharded")}


@pytest.fixture(scope="module", params=RANKS)
def ranks(request, tmp_path_factory):
    """Results by rank, the arguments of the launch, and the directory."""
    count, *arguments = RANKS[request.param]
    directory = tmp_path_factory.mktemp("folders")
    torchrun("checkpoint_folders.py", directory, *arguments, ranks=count)
    results = [torch.load(directory / f"rank{rank}.pt") for rank in range(count)]
    return results, arguments, directory


def test_every_rank_gets_its_own_back_and_goes_on_bit_for_bit(ranks):
    results, arguments, _ = ranks
    ranks_per_worker = arguments[0]
    for rank in results:
        assert rank["ways"].keys() == set(ways(*arguments))
        for way, found in rank["ways"].items():
            assert found["before"] and not found["loaded"] and not found["end"], way
            assert found["steps"] == BEFORE + AFTER, way
            assert found["is the model's"], way
    groups_of_ranks = {str(next(iter(rank["ways"].values()))["groups"]) for rank in results}
    assert len(groups_of_ranks) == (1 if ranks_per_worker == 1 else 2)


def test_what_would_lose_the_states_of_others_is_refused(ranks):
    results, *_ = ranks
    for place, rank in enumerate(results):
        for call in ("full", "full, offloaded", "set full", "broadcast"):
            assert rank["refusals"][call] == (
                "ValueError: full_state_dict=True keeps the state of rank 0 alone, and each of "
                f"{len(results)} ranks has its own: leave it out and save on all ranks by "
                "torch.distributed.checkpoint, or save EF21Muon.full_state_dict()"
            )
        of_another = rank["refusals"]["of the next rank"]
        assert of_another.startswith(
            f"ValueError: the state is of rank {(place - 1) % len(results)} (here {place})"
        )
        assert "\n" not in of_another
    assert results[-1]["refusals"]["flat without tables"].startswith(
        "ValueError: flatten_optimizer_state_dict=True is not allowed where a rank remembers"
    )


def test_a_folder_of_more_ranks_is_refused(ranks):
    results, arguments, directory = ranks
    if arguments[0] > 1:
        return
    model = new_model()
    optimizer = CASES["rank0"](groups_of(model), None)
    state = get_optimizer_state_dict(model, optimizer)
    dcp.load({"optim": state}, checkpoint_id=directory / "rank0")
    with pytest.raises(
        ValueError, match=rf"^the state is of ranks {len(results)} \(here 1\).*: sta"
    ):
        set_optimizer_state_dict(model, optimizer, state)
