"""Runs that are resumed, go on with other workers, or are damaged.

Run by torchrun as `resume.py WHAT DIRECTORY OVERRIDE...`, with overrides for small runs; see
test_resume.py for the runs of `cases` and `more cases`, and test_elastic.py for those of `elastic`.
"""

import os
import shutil
import signal
import sys
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch
from omegaconf import OmegaConf
from run import PATIENCE

import train
import training.config
import training.resume
from training.config import Job, compose
from training.workers import RunError, Workers, exit_process

# One that draws nothing, and three that draw values, sketches and places.
COMPRESSORS = {
    "topk": "topk:0.15:natural",
    "natural": "natural",
    "quantized_rank": "quantized_rank:0.3:normal4:normal2",
    "randk": "randk:0.15:natural",
}
TOP = "w2s=topk:0.15:natural"
LOCAL = (TOP, "optimizer=local", "optimizer.sync_every=3")  # step 2 is in the middle of a round


def of_servers(kind: str) -> tuple[str, ...]:
    """Sharded servers, which send with the compressor before it in COMPRESSORS."""
    kinds = [*COMPRESSORS]
    before = kinds[kinds.index(kind) - 1]
    both = f"w2s={COMPRESSORS[kind]}", f"s2w={COMPRESSORS[before]}"
    return (*both, "optimizer.server=sharded")


CASES = {
    "ef14": (TOP, "optimizer.feedback=ef14"),
    "mvr": (TOP, "s2w=natural", "optimizer.momentum_kind=mvr"),
    "demo": ("optimizer=demo",),
    "muon_greedylore": ("optimizer=muon_greedylore", "optimizer.refresh_every=3"),
    "local": (*LOCAL, "s2w=natural", "optimizer.outer_momentum=0.5"),
    "local, messages under way": (*LOCAL, "optimizer.streaming=true", "optimizer.sync_delay=1"),
    "local, sharded model": (*LOCAL, "optimizer.outer_lr=0.9", "ranks_per_worker=2", "fsdp=true"),
    "diloco": ("optimizer=diloco", "optimizer.sync_every=3"),
    "asynchronous": (TOP, "s2w=natural"),
    "randk, sharded": of_servers("randk"),
    "natural, rank0": ("w2s=natural", "optimizer.server=rank0"),
}
# Each is like some of those above, but for one option.
MORE_CASES = {
    "no feedback": (TOP, "optimizer.feedback=none"),
    "other start": (TOP, "optimizer.momentum_init=zero", "optimizer.first_message=full"),
    "hessian": (TOP, "optimizer.momentum_kind=hessian", "batch.micro_size=2"),
    "two ranks a worker": (TOP, "ranks_per_worker=2"),
    **{name: (f"optimizer={name}",) for name in ("adamw", "muon")},
    "dion natural": ("optimizer=dion", "optimizer.values=natural"),
    "local ef21, two ranks a worker": (*LOCAL, "optimizer.feedback=ef21", "ranks_per_worker=2"),
    "sharded model": (TOP, "s2w=natural", "ranks_per_worker=2", "fsdp=true"),
    "muloco": ("optimizer=muloco", "optimizer.sync_every=3"),
    "sparseloco": ("optimizer=sparseloco", "optimizer.sync_every={0:3,3:1}"),
    **{f"{kind}, sharded": of_servers(kind) for kind in ("topk", "natural", "quantized_rank")},
    "natural, replicated": ("w2s=natural", "optimizer.server=replicated"),
}
ALL_CASES = CASES | MORE_CASES
# Of all cases.
COMMON = ("checkpoint.every=2", "check_every=1", "schedule.warmup=0.75", "eval.tokens=128")

# Where runs go on from, and with how many workers and which placement.
STARTS = {"two": (2, "sharded", "s2w=natural"), "three": (3, "sharded")}
ELASTIC = {
    "two-to-three": ("two", 3, "rank0"),
    "three-to-two": ("three", 2, "replicated"),
    "two-to-one": ("two", 1, "sharded"),
}
LAYER = "blocks.0.mlp.expand.weight"
DAMAGES = {
    "parameter": ("check_every=2",),
    "parameter of adamw": ("check_every=2", "optimizer=adamw"),
    "parameter before a checkpoint": ("check_every=0", "checkpoint.every=4"),
    "gradient estimate": ("check_every=2", "optimizer.server=sharded"),
}


def with_options(job: Job, **options) -> Job:
    return replace(job, config=OmegaConf.merge(job.config, options))


def around_steps(before=None, after=None):
    """In it, training steps call `before(run, step)` and `after(run, step)`."""
    take = train.Run.step

    def step(run):
        number = run.scheduler.last_epoch + 1
        if before:
            before(run, number)
        loss = take(run)
        if after:
            after(run, number)
        return loss

    return mock.patch.object(train.Run, "step", step)


def run_alone(directory: Path, *overrides: str) -> None:
    """A whole run as one worker in this process, with a checkpoint after every step."""
    numbers = signal.SIGTERM, signal.SIGINT
    handlers = [signal.getsignal(number) for number in numbers]
    job = compose(("checkpoint.every=1", *overrides))
    try:
        assert train.run_job(job, directory, Workers())
    finally:
        for number, handler in zip(numbers, handlers, strict=True):
            signal.signal(number, handler)


def copy_up_to(step: int, source: Path, target: Path, workers: Workers) -> None:
    """A run directory without its checkpoints after `step`: that of a run killed before them."""
    if workers.first:
        shutil.copytree(source, target)
        for path in (target / "checkpoints").iterdir():
            if path.name > f"step-{step:08}":
                shutil.rmtree(path)
    workers.gather(None)  # wait for it


def run_cases(workers: Workers, cases: dict, directory: Path, small: list[str]) -> int:
    """For every case a run of four steps, `whole`, and one that went on from step 2, `resumed`."""
    for case, overrides in cases.items():
        job = compose((*small, *COMMON, *overrides))
        whole, resumed = directory / case / "whole", directory / case / "resumed"
        train.run_job(job, whole, workers)
        if case.startswith("asynchronous"):
            job = with_options(job, checkpoint={"asynchronous": True})
            interrupt(job, resumed, workers)
        else:
            copy_up_to(2, whole, resumed, workers)
        train.run_job(with_options(job, resume="auto"), resumed, workers)
    return 0


def interrupt(job: Job, directory: Path, workers: Workers) -> None:
    """Run it up to an error before step 4."""

    def stop(run, step):
        if step == 4:
            raise RunError("interrupted")

    try:
        with around_steps(before=stop):
            train.run_job(job, directory, workers)
    except RunError as error:
        assert str(error) == "interrupted", error


def run_elastic(directory: Path, small: list[str]) -> int:
    """STARTS, what ELASTIC makes of them after step 4, and DAMAGES, in processes for 3 workers."""
    for count in (2, 3, 2, 1):
        os.environ["WORLD_SIZE"] = str(count)
        workers = Workers(timeout=PATIENCE)
        if workers.rank < count:
            status = workers.run(lambda w=workers: run_with(w, directory, small))
            assert status == 0
    return 0


def run_with(workers: Workers, directory: Path, small: list[str]) -> int:
    """What can be run with so many workers and has not been."""
    common = (*small, TOP, "checkpoint.every=4", "check_every=1")
    for name, (count, placement, *overrides) in STARTS.items():
        if count == workers.count and not (directory / name).exists():
            job = compose((*common, *overrides, f"optimizer.server={placement}"))
            train.run_job(job, directory / name, workers)
    for name, (start, count, placement) in ELASTIC.items():
        if count == workers.count and (directory / start).exists():
            copy_up_to(4, directory / start, directory / name, workers)
            _, _, *overrides = STARTS[start]
            overrides += [f"optimizer.server={placement}", "resume=elastic", "directory=given"]
            go_on(compose((*common, *overrides)), directory / name, workers)
    for name, overrides in DAMAGES.items():
        if workers.count == 2 and not (directory / name).exists():
            damage(name, compose((*small, TOP, *overrides)), directory / name, workers)
    return 0


def go_on(job: Job, directory: Path, workers: Workers) -> None:
    """Run it, and write what every worker went on with."""
    resume_elastic = training.resume.resume_elastic

    def recorded(run, path):
        facts = resume_elastic(run, path)
        state = {}
        for name, parameter in run.raw_model.named_parameters():
            of_layer = {"parameter": parameter.detach(), **run.optimizer.state[parameter]}
            state |= {f"{name} {key}": tensor.clone() for key, tensor in of_layer.items()}
        torch.save(state, directory / f"{workers.rank}.pt")
        return facts

    with mock.patch("training.resume.resume_elastic", recorded):
        train.run_job(job, directory, workers)


def damage(what: str, job: Job, directory: Path, workers: Workers) -> None:
    """A run in which a bit of a parameter, or a G_j, is lost by rank 1 in step 3."""

    def lose(run, step):
        if step != 3 or workers.first:
            return
        parameter = run.raw_model.get_parameter(LAYER)
        if what == "gradient estimate":
            run.optimizer.state[parameter]["gradient_estimate"].zero_()
        else:
            parameter.detach().view(torch.int32)[7, 5] ^= 1 << 12

    try:
        with around_steps(after=lose):
            train.run_job(job, directory, workers)
    except RunError:  # which the log has
        pass


def main() -> int:
    what, directory, *small = sys.argv[1:]
    if what == "elastic":
        return run_elastic(Path(directory), small)
    workers = Workers(timeout=PATIENCE)
    cases = {"cases": CASES, "more cases": MORE_CASES}[what]
    return workers.run(lambda: run_cases(workers, cases, Path(directory), small))


if __name__ == "__main__":
    exit_process(main())
