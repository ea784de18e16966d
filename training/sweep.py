"""The runs that a command line asks for: their configurations, their directories, their order."""

from argparse import Namespace
from collections.abc import Callable
from contextlib import nullcontext, suppress
from itertools import chain
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from data.files import Claim, ClaimedError
from training.config import Job, compose, flat, sweep
from training.groups import groups_of_a_job
from training.log import completed
from training.nodes import require_same_code, require_shared
from training.plan import plan
from training.resume import require_same_config
from training.workers import RunError, Workers

# Builds a run. Raises RunError if something is wrong with its configuration.
BuildRun = Callable[[DictConfig, Workers], object]
# Runs a job, from its configuration to its picture. Returns whether it took all its steps.
RunJob = Callable[[Job, Path, Workers], bool]


def run_jobs(arguments: Namespace, workers: Workers, build_run: BuildRun, run_job: RunJob) -> int:
    """Do what the command line asks for, and list the jobs that failed; return the exit status.

    All jobs are composed, and those of a sweep are built once, before the first one starts. Raises
    RunError for the first job that fails, unless fail_fast=false, and if the workers have different
    command lines or configurations.
    """
    _require_one_command(arguments, workers)
    require_same_code(workers)
    # Rank 0's, since every process would draw another order for shuffle().
    all_overrides = workers.broadcast(sweep(arguments.overrides, arguments.multirun))
    jobs = [compose_or_error(one, name_overrides=len(all_overrides) > 1) for one in all_overrides]
    _require_one_configuration(jobs, workers)
    errors = [job for job in jobs if isinstance(job, RunError)]
    jobs = [job for job in jobs if isinstance(job, Job)]
    if errors and all(job.config.fail_fast for job in jobs):
        raise errors[0]
    if len(all_overrides) > 1 and any(job.config.membership.name != "fixed" for job in jobs):
        raise RunError(
            "a sweep needs membership=fixed: start runs whose workers come and go one after the "
            "other"
        )
    if arguments.cfg:
        workers.say("---\n".join(OmegaConf.to_yaml(job.config) for job in jobs))
    elif any(job.config.dry_run for job in jobs):
        for job in jobs:
            tables = workers.together(lambda job=job: plan(job.config))
            workers.say(f"{' '.join(job.overrides)}\n\n{tables}\n")
    else:
        if len(jobs) > 1:
            errors += _unfit(jobs, workers, build_run)
        errors += _train_jobs(jobs, arguments.multirun, workers, run_job)
    if errors:
        workers.say("\n".join([f"\n{len(errors)} jobs failed:", *map(str, errors)]), error=True)
    return 1 if errors else 0


def _require_one_command(arguments: Namespace, workers: Workers) -> None:
    """Raise RunError, on all workers, if a node was given other overrides."""
    options = ["-m"] * arguments.multirun + ["--cfg"] * arguments.cfg
    first, *others = workers.gather(sorted([*options, *arguments.overrides]))
    for rank, other in enumerate(others, 1):
        if other != first:
            theirs, ours = (
                " ".join(sorted({*a} - {*b})) or "without"
                for a, b in ((other, first), (first, other))
            )
            raise RunError(
                f"rank {rank} was started with {theirs} where rank 0 has {ours}: start all workers "
                "with the same command line"
            )


def _require_one_configuration(jobs: list[Job | RunError], workers: Workers) -> None:
    """Raise RunError if files of configs/ differ between nodes."""
    mine = [
        OmegaConf.to_container(job.config, resolve=True) if isinstance(job, Job) else str(job)
        for job in jobs
    ]
    for rank, theirs in enumerate(workers.gather(mine)):
        for own, other in zip(mine, theirs, strict=True):
            if own != other:
                raise RunError(
                    f"rank {rank} and rank {workers.rank} make different configurations of the "
                    f"same command line ({_difference(other, own)}): use the same code and configs/"
                    " on all nodes"
                )


def _difference(other: dict | str, own: dict | str) -> str:
    """How the configurations of two ranks differ; or their errors."""
    if isinstance(other, str) or isinstance(own, str):
        return " against ".join(one if isinstance(one, str) else "none" for one in (other, own))
    others, owns = flat(other), flat(own)
    return ", ".join(
        f"{key}={others.get(key)!r} against {owns.get(key)!r}"
        for key in sorted(others.keys() | owns.keys())
        if others.get(key) != owns.get(key)
    )


def _unfit(jobs: list[Job], workers: Workers, build_run: BuildRun) -> list[RunError]:
    """The errors of jobs that cannot be built. Those jobs are removed from the list."""
    errors = []
    for job in list(jobs):
        try:
            with groups_of_a_job(workers):
                workers.together(lambda job=job: build_run(job.config, workers))
        except RunError as error:
            error = RunError(f"{error} (in {' '.join(job.overrides)})")
            if all(job.config.fail_fast for job in jobs):
                raise error from None
            workers.say(f"error: {error}: passed over", error=True)
            errors.append(error)
            jobs.remove(job)
    return errors


def _train_jobs(
    jobs: list[Job], multirun: bool, workers: Workers, run_job: RunJob
) -> list[RunError]:
    """Train one job after the other; return the errors of those that failed.

    In a sweep, jobs that are completed already are skipped, and others start anew in their
    directory. A single run gets a directory of its own.
    """
    if len(jobs) > 1 and any(job.config.directory for job in jobs):
        raise RunError("directory= names a single run: use runs= for the folder of a sweep")
    fail_fast = all(job.config.fail_fast for job in jobs)
    errors = []
    for number, job in enumerate(jobs, 1):
        heading = f"\njob {number} of {len(jobs)}: " if multirun else None
        try:
            # The last job's groups end with the process: to destroy them earlier could only fail.
            more = number < len(jobs)
            with groups_of_a_job(workers) if more else nullcontext():
                completed_it = _train(job, heading, workers, run_job)
            if not completed_it:
                break
        except RunError as error:
            if fail_fast:
                raise
            workers.say(f"error: {error}: passed over", error=True)
            errors.append(RunError(f"{job.name(workers.count)}: {error}"))
    return errors


def _train(job: Job, heading: str | None, workers: Workers, run_job: RunJob) -> bool:
    """Train in the run's directory, which no other launch can use meanwhile.

    heading: what is printed before the directory of a sweep's job, None for a single run. Returns
    whether the next job may start: False if this one was asked to stop.
    """
    multirun = heading is not None
    claim = workers.together(
        lambda: claim_directory(job, workers.count, multirun) if workers.first else None
    )
    with claim or nullcontext():
        directory = workers.broadcast(claim and claim.folder)
        if multirun:
            workers.say(f"{heading}{directory}")
        again = multirun or job.config.resume != "none"
        if again and (done := workers.broadcast(completed(directory))):
            require_same_config(job.config, done, directory, free=("optimizer.server",))
            workers.say("already completed: skipped")
            return True
        if job.config.checkpoint.every or job.config.resume != "none":
            require_shared(directory, workers)
        return run_job(job, directory, workers)


def compose_or_error(overrides: tuple[str, ...], name_overrides: bool) -> Job | RunError:
    """The job, or what is wrong with it; the error names all overrides if `name_overrides`."""
    try:
        return compose(overrides)
    except RunError as error:
        where = f" (in {' '.join(overrides)})" if name_overrides else ""
        return RunError(str(error).removesuffix(where) + where)


def claim_directory(job: Job, workers: int, multirun: bool) -> Claim:
    """Claim the directory of the run. Nothing is overwritten; sweeps and resumed runs find theirs.

    Raises RunError for a directory that exists and should not, and for one that cannot be written.
    Raises ClaimedError, with the number of the process, if another run uses it.
    """
    try:
        return _claim(job, workers, multirun)
    except ClaimedError:
        raise
    except OSError as error:
        raise RunError(
            f"the run directory {error.filename} cannot be written ({error.strerror}): give "
            "another with directory= or runs="
        ) from error


def _claim(job: Job, workers: int, multirun: bool) -> Claim:
    config = job.config
    again = multirun or config.resume != "none"
    own = "" if config.membership.worker is None else f"worker{config.membership.worker}"
    if config.directory is not None:
        path = Path(config.directory, own)
        if path.exists() and not path.is_dir():
            raise RunError(f"directory={path} is a file: give a folder")
        try:
            return Claim(path, new=not again)
        except FileExistsError:
            raise RunError(
                f"directory={path} exists already: resume with resume=auto, or give another"
            ) from None
    path = Path(config.runs, job.name(workers), own)
    if again:
        return Claim(path)
    others = (path.with_name(f"{path.name}-{number}") for number in range(2, 10_000))
    for candidate in chain([path], others):
        with suppress(FileExistsError):
            return Claim(candidate, new=True)
    raise RunError(f"{path} and its like exist already: give another folder with runs=")
