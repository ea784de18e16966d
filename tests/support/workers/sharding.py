"""A model over the ranks of one worker: its values, memory, messages and graphs; test_sharding.py.

`sharding.py DIRECTORY` writes DIRECTORY/rank{r}.json; with `graphs` behind it, of graphs alone.
"""

import json
import sys
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from silent import Silent
from torch._dynamo.backends.debugging import aot_eager
from torch.distributed.distributed_c10d import _world
from torch.profiler import ProfilerActivity, profile

from ef21_muon.transport.shards import local
from model import GPT, GPTConfig
from scripts.step124m.allocations import Allocations, record_function
from training.gradients import GradientComputation
from training.groups import groups_of_a_job
from training.sharding import new_worker_mesh, shard
from training.weights import draw_weights
from training.workers import Workers

SMALL = GPTConfig(layers=2, width=48, heads=2, context=40, vocab_size=61)  # 61 rows of 2 ranks
LARGE = GPTConfig(layers=8, width=256, heads=2, context=64, vocab_size=512)
SEED = 3


def new_model(config: GPTConfig, workers: Workers, sharded: bool = True) -> GPT:
    with torch.device("meta"):
        model = GPT(config)
    if sharded:
        shard(model, new_worker_mesh(workers.count, workers))
    draw_weights(model, SEED, workers)
    return model


def is_as_whole(model: GPT) -> bool:
    """Whether the rows of all ranks, and the buffers, are those of a model that was never apart."""
    whole = GPT(model.config, SEED)
    return all(
        torch.equal(mine.full_tensor(), its)
        for mine, its in zip(model.parameters(), whole.parameters(), strict=True)
    ) and all(map(torch.equal, model.buffers(), whole.buffers()))


def is_of_the_first(workers: Workers) -> bool:
    """Whether the model is rank 0's where others draw other numbers."""
    own = torch.randn
    torch.randn = lambda *sizes, **options: own(*sizes, **options) + workers.rank
    model = new_model(SMALL, workers)
    torch.randn = own
    return is_as_whole(model)


def memory(workers: Workers) -> dict:
    """The share of a model's size that a rank has at most, and then keeps."""
    with Allocations(shapes=False) as memory, record_function("build"):
        model = new_model(LARGE, workers)
    size = 4 * LARGE.parameter_count
    return {"peak": memory.phases["build"].peak_bytes / size, "kept": memory.kept / size,
            "large is as whole": is_as_whole(model)}  # fmt: skip


def batch(rank: int, passes: int, sequences: int = 4) -> list[list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(rank)
    tokens = torch.randint(61, (passes, sequences, 41), generator=generator)
    return [[one[:, :-1], one[:, 1:]] for one in tokens]


def computation_of(workers: Workers, sharded: bool, compiled: bool = False) -> GradientComputation:
    model = new_model(SMALL, workers, sharded)
    with torch.no_grad():
        for parameter in model.parameters():  # also of those that begin as zeros
            local(parameter).add_(0.01)
    return GradientComputation(model, Silent(), torch.device("cpu"), "float32", compiled)


def mean_gradients(passes: GradientComputation, ranks: int) -> list[torch.Tensor]:
    """Of all ranks, whole."""
    gradients = [parameter.grad for parameter in passes.raw_model.parameters()]
    if hasattr(gradients[0], "full_tensor"):
        return [gradient.full_tensor() for gradient in gradients]
    for gradient in gradients:
        dist.all_reduce(gradient)
    return [gradient / ranks for gradient in gradients]


def distance(ones: list[torch.Tensor], others: list[torch.Tensor]) -> float:
    """The largest, relative to the norm, of all pairs."""
    pairs = zip(ones, others, strict=True)
    return max(((one - other).norm() / other.norm()).item() for one, other in pairs)


def scatters(passes: GradientComputation, rank: int) -> int:
    """Reduce-scatters of a gradient of three forward passes."""
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        passes.compute(batch(rank, passes=3))
    return sum(event.name == "c10d::_reduce_scatter_base_" for event in seen.events())


def messages(workers: Workers) -> dict:
    """Of several passes: gradients, and how often they are reduced and scattered."""
    sharded, every, whole = (computation_of(workers, kind) for kind in (True, True, False))
    every.without_sync = nullcontext
    found = {
        "scatters": scatters(sharded, workers.rank),
        "of every pass": scatters(every, workers.rank),
        "layers": SMALL.layers,
    }
    whole.compute(batch(workers.rank, passes=3))
    gradients = [mean_gradients(one, workers.count) for one in (sharded, every, whole)]
    return found | {
        "to every pass": distance(*gradients[:2]),
        "to whole": distance(gradients[0], gradients[2]),
    }


@contextmanager
def counted():
    """Within it the sizes of the graphs that are compiled, one after the other."""
    graphs, own = [], torch.compile

    def counting(graph, inputs):
        graphs.append(sum(node.op.startswith("call") for node in graph.graph.nodes))
        return aot_eager(graph, inputs)

    torch.compile = lambda function, **options: own(function, backend=counting, **options)
    yield graphs
    torch.compile = own
    torch._dynamo.reset()


def graphs(workers: Workers) -> dict:
    """Of a compiled model: the graphs of a step, those that later ones add, and its numbers."""
    found = {}
    for name, sharded in (("whole", False), ("sharded", True)):
        results = []
        for compiled in (False, True):
            with counted() as of_step:
                passes = computation_of(workers, sharded, compiled)
                loss = passes.compute(batch(workers.rank, passes=2))
                found[name] = list(of_step)
                passes.compute(batch(workers.rank + 8, passes=2))
                found[f"{name}, second step"] = len(of_step) - len(found[name])
                windows = [*batch(0, passes=3), *batch(1, 1, sequences=2)]
                test_loss, _ = passes.loss_sum((*one, one[0].numel()) for one in windows)
                found[f"{name}, tests"] = len(of_step) - len(found[name])
            results.append([loss.item(), test_loss.item(), mean_gradients(passes, workers.count)])
        (loss, test_loss, gradients), (other, other_test, others) = results
        found[f"{name}, distance"] = max(
            abs(loss / other - 1), abs(test_loss / other_test - 1), distance(others, gradients)
        )
    return found


def groups(workers: Workers) -> list[int]:
    """Process groups there are, in and after each of three jobs that shard a model."""
    counts = []
    for _ in range(3):
        with groups_of_a_job(workers):
            passes = computation_of(workers, sharded=True)
            passes.compute(batch(workers.rank, passes=1))
            counts.append(len(_world.pg_map))
        counts.append(len(_world.pg_map))
    return counts


def all_but_graphs(workers: Workers) -> dict:
    report = {"small is as whole": is_as_whole(new_model(SMALL, workers))}
    report |= {"is of rank 0": is_of_the_first(workers)}
    return report | memory(workers) | messages(workers) | {"groups": groups(workers)}


def work(workers: Workers) -> int:
    report = (graphs if sys.argv[2:] == ["graphs"] else all_but_graphs)(workers)
    (Path(sys.argv[1]) / f"rank{workers.rank}.json").write_text(json.dumps(report))
    return 0


if __name__ == "__main__":
    workers = Workers()
    sys.exit(workers.run(lambda: work(workers)))
