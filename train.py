"""Train a GPT with EF21-Muon: `torchrun --standalone --nproc_per_node=2 train.py [KEY=VALUE ...]`.

Every process is a worker with its own part of the training tokens. Hydra composes the configuration
from configs/ (`--help` lists the groups); with `-m`, comma-separated values make a sweep of jobs
that run one after the other in the same processes. Each run leaves a directory with its resolved
configuration, its log metrics.jsonl and a picture of it.
"""

import math
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch
from omegaconf import DictConfig

from model import GPT
from training.arguments import how_to_go_on, parse_arguments
from training.checkpoint import Checkpoints
from training.config import Job, build
from training.data import Feed
from training.fleet import Stopped, members_of
from training.log import NoLog, RunLog
from training.method import build_optimizer, require_parts, run_label
from training.nodes import require_same_inputs
from training.passes import Passes
from training.progress import Progress, fail
from training.report import facts_of, introduction, result_table
from training.resume import checkpoint_of, resume
from training.schedule import Later, due, new_scheduler
from training.sharding import new_worker_mesh, shard
from training.stops import Stops
from training.sweep import run_jobs
from training.weights import draw_weights
from training.workers import FinalError, RunError, Workers, leave, one_line


class Run:
    """Everything of one run on this worker, built and checked before training starts."""

    def __init__(self, config: DictConfig, workers: Workers):
        self.config, self.workers = config, workers
        on_cuda = workers.device.type == "cuda"
        if on_cuda:  # of what the library compiles
            torch.compiler.set_stance("default" if config.compile else "force_eager")
        group = workers.group(config.transport, config.optimizer.get("sync_delay", 0))
        workers.together(self._prepare)  # before workers wait for each other
        self.members = members_of(config, workers)
        mesh = None
        if config.ranks_per_worker > 1:
            mesh = new_worker_mesh(config.ranks_per_worker, workers, from_host=group is not None)
        if config.fsdp:
            shard(self.raw_model, mesh)
        draw_weights(self.raw_model, config.seed, workers)
        self.optimizer = build_optimizer(
            config, self.raw_model, group, mesh, self.members.transport
        )
        self.scheduler = new_scheduler(self.optimizer, config, steps=0)
        self.passes = Passes(
            self.raw_model,
            self.optimizer,
            workers.device,
            config.precision,
            config.compile,
            config.clip_grad_norm,
        )
        # While workers train on, answers whether to stop are on their way, and sums of losses.
        seldom = self.members.ask_every(self.optimizer)
        self.stops, self.later = Stops(workers, seldom), Later(seldom // 2)
        self.tokens_per_step = config.batch.global_size * self.raw_model.config.context
        told = self.tokens_per_step // (config.membership.workers or 1)
        self.progress = Progress(workers, self.optimizer, told, self.members.synced_steps)

    def _prepare(self) -> None:
        """What a worker needs of its own node: data, the model, and the classes of the others."""
        if self.config.fsdp and self.config.ranks_per_worker == 1:
            raise RunError(
                "fsdp=true needs workers of several ranks: give ranks_per_worker=2 or more"
            )
        model_config = build(self.config.model, "model")
        self.feed = Feed(self.config, model_config.context, self.workers)
        with torch.device("meta"):
            self.raw_model = GPT(model_config)
        require_parts(self.config, self.raw_model)

    def step(self) -> torch.Tensor:
        """A training step; returns this worker's mean loss before it."""
        with self.optimizer.timer("data"):
            batch = self.feed.next()
        gradient = partial(self.passes.gradient, batch)
        loss = None if self.passes.twice else gradient()
        self.stops.ask()
        if self.passes.twice:
            loss = self.optimizer.step(gradient)
        else:
            self.optimizer.step()
        self.raw_model.zero_grad()  # of all layers, also those that another rank steps
        self.scheduler.step()
        self.members.follow(self)
        return loss

    def test_loss(self) -> float:
        """Mean loss of W, on which workers agree, on the test windows of all workers."""
        with self.members.at_work("evaluation"):
            total, tokens = self.passes.loss_sum(self.feed.test())
        total, tokens = self.workers.total(total, tokens)
        if not math.isfinite(total):
            raise RunError(
                f"the test loss is {total / tokens} after step {self.scheduler.last_epoch}: lower "
                "the learning rate, or look at the data of the steps before"
            )
        return total / tokens

    def position(self) -> dict:
        """Where the run is: the fields that all records share."""
        return self.progress.position(self.scheduler.last_epoch)

    def train(self, log: RunLog | NoLog, checkpoints: Checkpoints) -> dict | None:
        """The training loop; returns the facts of the end record, None if it was asked to stop."""
        config, progress = self.config, self.progress
        self.members.join(self)
        progress.start()
        test_loss = None
        while (step := self.scheduler.last_epoch + 1) <= config.steps:
            lr = self.scheduler.get_last_lr()[0]
            if due(step, config.diagnostics_every):
                self.optimizer.watch = True
            with self.members.at_work("step"):
                progress.add(self.step())
            step = self.scheduler.last_epoch  # in a fleet that of the others
            last = step >= config.steps
            if last:
                self.optimizer.final_sync()

            evaluate = last or due(step, config.eval.every)
            save = last or due(step, config.checkpoint.every)
            told = evaluate or save or due(step, config.log_every)
            self.stops.settle(at_once=evaluate or save)
            self.later.settle(math.inf if evaluate or save else step)
            save |= self.stops.requested
            log.advance(step)
            self.members.tell(log)
            if config.diagnostics_every and self.optimizer.watch:
                self.diagnose(step, log)
            if save or due(step, config.check_every):
                self.check()
            if not (told or save):
                continue

            progress.clock()
            if told:
                record = self.position() | {"lr": lr, "phases": progress.rounded_phases}
                self.later.add(step, progress.tell(record, log.train))
            else:  # it stops, and goes on in the middle of what the next record is of
                progress.require_finite()
            self.later.settle(math.inf if evaluate or save else step)
            if evaluate:
                test_loss = self.test_loss()
                log.eval(self.position() | {"test_loss": test_loss})
            if save and config.checkpoint.every:
                self.save(log, checkpoints)
            checkpoints.poll()
            if self.stops.requested and not last:
                return None
            if evaluate or save:
                progress.start()
                self.stops.start()

        late = test_loss is None  # this worker came after the last step
        test_loss = self.test_loss() if late else test_loss
        self.members.wait_for_peers(self, log, test_loss if late else None)
        return self.summary(test_loss)

    def of_a_worker(self, value) -> list:
        """The values of all ranks of the first worker; with workers of one rank this rank's own."""
        size = self.config.ranks_per_worker
        return self.workers.gather(value)[:size] if size > 1 else [value]

    def label(self) -> str:
        """The run's name in figures. To be asked for by all workers."""
        return self.config.label or run_label(self.optimizer, self.of_a_worker)

    def diagnose(self, step: int, log: RunLog | NoLog) -> None:
        """Record what compression did, once a message of each of a worker's layers was watched."""
        seen = self.of_a_worker(self.optimizer.diagnostics() if self.optimizer.watched else None)
        if None not in seen:
            log.diagnostics(step, {name: one for rank in seen for name, one in rank.items()})
            self.optimizer.watch = False

    def check(self) -> None:
        """Raise RunError if workers have parted or state was lost."""
        self.workers.together(self.optimizer.check_agreement)

    def save(self, log: RunLog | NoLog, checkpoints: Checkpoints) -> None:
        """Write a checkpoint of this moment."""
        with self.members.at_work("checkpoint"):
            tensors, facts = checkpoint_of(self)
            log_bytes = self.workers.together(log.size)
            checkpoints.save(self.scheduler.last_epoch, tensors, facts | {"log_bytes": log_bytes})

    def summary(self, test_loss: float) -> dict:
        """The facts of the end record."""
        return self.position() | {
            "test_loss": test_loss,
            "uncompressed_bytes": self.config.steps * 4 * self.raw_model.config.parameter_count,
            "optimizer_share": round(self.progress.optimizer_share, 4),
            **self.members.facts(),
        }


def run_job(job: Job, directory: Path, workers: Workers) -> bool:
    """One run, from its configuration to its picture; whether it came to its end.

    Raises RunError, on all workers alike.
    """
    config = job.config
    run = workers.together(lambda: Run(config, workers))
    require_same_inputs(config, run.feed.streams, workers)
    workers.say(introduction(run))
    checkpoints = Checkpoints(
        directory / "checkpoints", workers, config.checkpoint.keep, config.checkpoint.asynchronous
    )
    resumed = resume(run, checkpoints, directory)
    new_log = partial(RunLog, directory, job, run.label(), facts_of(run), resumed)
    log = workers.together(new_log if workers.first else NoLog)
    end = None
    try:
        with workers.stoppable():
            with suppress(Stopped), run.members.refusals(log):
                end = run.train(log, checkpoints)
            checkpoints.settle()
    except BaseException as error:
        with suppress(OSError):  # of a disk that is full, which the error says
            log.end("failed", error=one_line(error))
        if isinstance(error, RunError):  # of all workers
            checkpoints.settle()
        raise
    finally:
        run.members.leave()
    if end is None:
        log.end("stopped", step=run.scheduler.last_epoch)
        workers.say(f"\nstopped as asked: {how_to_go_on(config, directory)}")
    elif workers.first:
        log.end("completed", **end)
        workers.say(f"\n{result_table(end)}\n\nlog      {log.path}")
        show_picture(directory, workers)
    return end is not None


def show_picture(directory: Path, workers: Workers) -> None:
    """Draw a run that has come to its end, and say where, or why there is no picture."""
    try:
        from training.picture import draw  # matplotlib, for which other workers need not wait

        workers.say(f"picture  {draw([directory], directory)[0]}")
    except (Exception, SystemExit) as error:  # of any kind: the run is complete
        workers.say(
            f"warning: matplotlib has drawn no picture ({one_line(error)}): the log is complete, "
            f"draw it later with python scripts/figures.py {directory}",
            error=True,
        )


def main() -> int:
    try:
        arguments = parse_arguments()
    except RunError as error:
        return Workers().finish(partial(fail, FinalError(str(error))))
    workers = Workers(arguments.timeout)

    def work() -> int:
        try:
            return run_jobs(arguments, workers, Run, run_job)
        except RunError as error:
            if workers.training:
                raise
            raise FinalError(str(error)) from error

    return workers.finish(work)


if __name__ == "__main__":
    leave(main())
