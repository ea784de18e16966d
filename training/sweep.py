"""The runs that a command line asks for: what they are, where they go, which are done already."""

from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

from omegaconf import OmegaConf

from training.config import Job, compose, sweep
from training.log import completed
from training.plan import plan
from training.resume import require_same_config
from training.workers import RunError, Workers

# One run, from its configuration to its picture; whether it came to its end.
RunJob = Callable[[Job, Path, Workers], bool]


def run_jobs(arguments: Namespace, workers: Workers, run_job: RunJob) -> int:
    """Do what the command line asks for, and tell of jobs that failed; returns the exit status.

    All jobs are composed before the first one starts. Raises RunError for the first that fails, but
    with fail_fast=false passes over it.
    """
    all_overrides = sweep(arguments.overrides, arguments.multirun)
    jobs = [compose_or_error(one, told=len(all_overrides) > 1) for one in all_overrides]
    errors = [job for job in jobs if isinstance(job, RunError)]
    jobs = [job for job in jobs if isinstance(job, Job)]
    if errors and all(job.config.fail_fast for job in jobs):
        raise errors[0]
    if arguments.cfg:
        workers.say("---\n".join(OmegaConf.to_yaml(job.config) for job in jobs))
    elif any(job.config.dry_run for job in jobs):
        for job in jobs:
            tables = workers.together(lambda job=job: plan(job.config))
            workers.say(f"{' '.join(job.overrides)}\n\n{tables}\n")
    else:
        errors += _train_jobs(jobs, arguments.multirun, workers, run_job)
    if errors:
        workers.say("\n".join([f"\n{len(errors)} jobs failed:", *map(str, errors)]), error=True)
    return 1 if errors else 0


def _train_jobs(
    jobs: list[Job], multirun: bool, workers: Workers, run_job: RunJob
) -> list[RunError]:
    """Train one job after the other; returns the errors of those that were passed over.

    In a sweep, jobs that are completed already are skipped, and others start anew in their
    directory; a single run gets a directory of its own.
    """
    if len(jobs) > 1 and any(job.config.directory for job in jobs):
        raise RunError("directory= names a single run: use runs= for the folder of a sweep")
    fail_fast = all(job.config.fail_fast for job in jobs)
    errors = []
    for number, job in enumerate(jobs, 1):
        directory = workers.broadcast(run_directory(job, workers, multirun))
        if multirun:
            workers.say(f"\njob {number} of {len(jobs)}: {directory}")
        again = multirun or job.config.resume != "none"
        if again and (done := workers.broadcast(completed(directory))):
            require_same_config(job.config, done, directory, free=("optimizer.server",))
            workers.say("already completed: skipped")
            continue
        try:
            if not run_job(job, directory, workers):
                break
        except RunError as error:
            if fail_fast:
                raise
            workers.say(f"error: {error}: passed over", error=True)
            errors.append(RunError(f"{directory.name}: {error}"))
    return errors


def compose_or_error(overrides: tuple[str, ...], told: bool) -> Job | RunError:
    """The job, or what is wrong with it, with all its overrides if these are to be told."""
    try:
        return compose(overrides)
    except RunError as error:
        where = f" (in {' '.join(overrides)})" if told else ""
        return RunError(str(error).removesuffix(where) + where)


def run_directory(job: Job, workers: Workers, multirun: bool) -> Path:
    """Where the run goes: nothing is overwritten, but a sweep and a resumed run find their own."""
    config = job.config
    again = multirun or config.resume != "none"
    if config.directory is not None:
        path = Path(config.directory)
        if path.exists() and not path.is_dir():
            raise RunError(f"directory={path} is a file: give a folder")
        if path.exists() and not again:
            raise RunError(
                f"directory={path} exists already: go on with resume=auto, or give another"
            )
        return path
    path = Path(config.runs) / job.name(workers.count)
    if again:
        return path
    candidates = (path, *(path.with_name(f"{path.name}-{n}") for n in range(2, 10_000)))
    return next(candidate for candidate in candidates if not candidate.exists())
