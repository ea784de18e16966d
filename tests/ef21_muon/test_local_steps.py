"""LocalSteps on 1 and 3 workers against local_reference.py; see workers/local_steps.py."""

import json

import numpy as np
import pytest
import reference
from local_reference import AdamW, GradientDescent, LocalRounds, Muon, chunk_top_k, statistical
from run import torchrun
from workers import local_steps, rounds
from workers.local_steps import CASES, EVERY, LR, MOMENTUM, RESUMED, STEPS, runs

WORKERS = (1, 3)
# Of so many workers, what is recorded and compared with the simulation.
WHOLE = [(workers, name) for workers in WORKERS for name in runs(workers) if "resumed" not in name]
COMPRESSORS = {
    "identity": reference.float32,
    "topk": lambda x: reference.top_k(local_steps.FRACTION, reference.float32)(x, None),
    "nearest": reference.natural,
    "statistical": statistical(4),
    "chunks": chunk_top_k(local_steps.K, local_steps.CHUNK, statistical(2)),
}
KEPT = {  # 1 where an entry is sent
    "topk": lambda x: reference.top_k(local_steps.FRACTION, np.ones_like)(x, None),
    "chunks": chunk_top_k(local_steps.K, local_steps.CHUNK, np.ones_like),
}
INNER = {
    "sgd": lambda: GradientDescent(LR, MOMENTUM),
    "adamw": lambda: AdamW(**local_steps.ADAMW),
    "muon": lambda: Muon(
        **local_steps.MUON,
        lmo=reference.spectral_lmo,
        others=[name for name, shape in local_steps.SHAPES.items() if len(shape) != 2],
        rest=AdamW(**local_steps.ADAMW),
    ),
}
START = {name: rounds.start(name) for name in local_steps.SHAPES}
PRECISION = 1e-5  # relative, as of W so of what has changed in it


def gradient(model, worker):
    result = {}
    for name, layer in model.items():
        inputs, targets = (x.astype(np.float64) for x in rounds.least_squares(name, worker))
        result[name] = (layer @ inputs - targets) @ inputs.T / inputs.shape[1]
    return result


def turns(layout, sync_every, streaming):
    """Of every layer the step in a round by which the bytes up to its own are due."""
    sizes = [len(names) * size for names, size in layout]
    result = {}
    for place, (names, _) in enumerate(layout):
        share = sum(sizes[: place + 1]) / sum(sizes)
        turn = next(step for step in range(sync_every) if (step + 1) / sync_every >= share - 1e-12)
        result |= dict.fromkeys(names, turn if streaming else sync_every - 1)
    return result


def simulate(case, layout, workers, steps=STEPS):
    """x_j and W after every step, and after the end of an unfinished round."""
    options = dict(CASES[case])
    sync_every, streaming = options.pop("sync_every", EVERY), options.pop("streaming", False)
    replicated = options.pop("server", "sharded") == "replicated" or workers == 1
    inner = INNER[options.pop("inner", "sgd")]
    if options.pop("mean", "all") == "senders":
        options["kept"] = KEPT[options["w2s"]]
    for direction in ("w2s", "s2w"):
        options[direction] = COMPRESSORS[options.get(direction, "identity")]
    simulation = LocalRounds(
        START,
        workers,
        gradient,
        inner,
        sync_every,
        turns(layout, sync_every, streaming),
        ways=1 if replicated else 2,
        **options,
    )
    local, shared = [], []
    for step in range(steps + (steps % EVERY > 0)):
        simulation.step() if step < steps else simulation.final_sync()
        local.append([flat(model) for model in simulation.models])
        shared.append(flat(simulation.shared))
    return np.array(local), np.array(shared)


def flat(model):
    return np.concatenate([model[name].ravel() for name in local_steps.SHAPES])


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    """Of 1 and of 3 workers: what every rank recorded, and the layouts."""
    arrays, layouts = local_steps.collect(0, 1)
    result = {1: ([arrays], layouts)}
    for workers in WORKERS[1:]:
        directory = tmp_path_factory.mktemp(f"local{workers}")
        torchrun("local_steps.py", directory, ranks=workers)
        arrays = [dict(np.load(directory / f"rank{rank}.npz")) for rank in range(workers)]
        result[workers] = arrays, json.loads((directory / "rank0.json").read_text())
    return result


def require_near(found, expected, start):
    """To PRECISION of the model, and of how far it has come."""
    for size in (expected, expected - start):
        assert np.linalg.norm(found - expected) <= PRECISION * np.linalg.norm(size)


@pytest.mark.parametrize(("workers", "case"), WHOLE)
def test_rounds_agree_with_a_simulation(recordings, workers, case):
    arrays, layouts = recordings[workers]
    steps = STEPS - 2 if "unfinished" in case else STEPS
    simulated = simulate(case.removesuffix(" unfinished"), layouts[case], workers, steps)
    for step, (local, shared) in enumerate(zip(*simulated, strict=True)):
        for rank, of_rank in enumerate(arrays):
            require_near(of_rank[f"{case} local"][step], local[rank], flat(START))
            if np.any(shared != flat(START)):
                require_near(of_rank[f"{case} global"][step], shared, flat(START))


@pytest.mark.parametrize("workers", WORKERS[1:])
def test_all_workers_agree_on_w_bit_for_bit_and_step_apart(recordings, workers):
    first, *others = recordings[workers][0]
    for name in first:
        if name.endswith("global"):
            assert all(np.array_equal(first[name], other[name]) for other in others), name
        if name.endswith("local") and "sync every 1" not in name:
            assert not any(np.array_equal(first[name], other[name]) for other in others), name


@pytest.mark.parametrize("workers", WORKERS[1:])
def test_the_mean_over_senders_is_bit_for_bit_that_of_any_placement(recordings, workers):
    of_first = recordings[workers][0][0]
    expected = of_first["senders sharded global"]
    for server in ("rank0", "replicated"):
        np.testing.assert_array_equal(of_first[f"senders {server} global"], expected, server)
    assert not np.array_equal(of_first["replicated global"], expected)  # over all


@pytest.mark.parametrize(
    ("workers", "case"),
    [(n, case) for n in WORKERS for case in RESUMED if f"{case} resumed" in runs(n)],
)
def test_a_loaded_state_resumes_bit_for_bit_from_the_middle_of_a_round(recordings, workers, case):
    """Also with messages under way, which are sent again and counted once."""
    for of_rank in recordings[workers][0]:
        for kind in ("local", "global", "bytes"):
            whole, resumed = of_rank[f"{case} {kind}"], of_rank[f"{case} resumed {kind}"]
            np.testing.assert_array_equal(whole, resumed)


@pytest.mark.parametrize("workers", WORKERS)
def test_logged_bytes_are_sent_bytes(recordings, workers):
    """Step by step, as seen by a spy; a round takes one message each way."""
    arrays, layouts = recordings[workers]
    for case in [name for count, name in WHOLE if count == workers]:
        message = sum(len(names) * size for names, size in layouts[case])
        messages = STEPS // CASES[case.removesuffix(" unfinished")].get("sync_every", EVERY)
        for of_rank in arrays:
            w2s, s2w, received, wire = of_rank[f"{case} bytes"].T
            np.testing.assert_array_equal(wire, of_rank[f"{case} seen"], case)
            everywhere = workers > 1 and "replicated" in case
            of_others = (workers - 1) * w2s if everywhere else s2w
            np.testing.assert_array_equal(received, of_others, case)
            if "streaming" not in case:
                assert w2s[-1] == messages * message, case
            assert np.all(np.diff(w2s) >= 0)
            assert (s2w[-1] > 0) == (workers == 1 or "replicated" not in case)


def test_a_streaming_round_uses_the_link_evenly(recordings):
    """After t of 4 steps no more than a message of a batch beyond t / 4 of the round's bytes."""
    arrays, layouts = recordings[1]
    sizes = [len(names) * size for names, size in layouts["streaming"]]
    w2s = arrays[0]["streaming bytes"][:, 0]
    steps = np.arange(1, STEPS + 1) / EVERY
    assert np.all(w2s <= steps * sum(sizes))
    assert np.all(w2s > steps * sum(sizes) - max(sizes))
    assert w2s[-1] == STEPS // EVERY * sum(sizes)
