"""Train a GPT with EF21-Muon: `torchrun --standalone --nproc_per_node=2 train.py [KEY=VALUE ...]`.

Every process is a worker that trains on its own part of the tokens. Hydra composes the
configuration from configs/ (`--help` lists the groups). With `-m`, comma-separated values make a
sweep, whose jobs run one after the other in the same processes. Each run leaves a directory with
its resolved configuration, its log metrics.jsonl and a picture of the log.
"""

import math
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch
from omegaconf import DictConfig

from model import GPT
from training.arguments import how_to_resume, parse_arguments
from training.checkpoint import Checkpoints
from training.config import Job, build
from training.data import BatchSource
from training.deferred import DeferredResults
from training.fleet import StoppedWhileWaiting, new_membership
from training.gradients import GradientComputation
from training.log import NoLog, RunLog
from training.method import build_optimizer, require_parts, run_label
from training.nodes import require_same_inputs
from training.progress import Progress, fail
from training.report import introduction, result_table, run_facts
from training.resume import checkpoint_of, resume
from training.schedule import due, new_scheduler
from training.sharding import new_worker_mesh, shard
from training.stops import StopRequests
from training.sweep import run_jobs
from training.weights import draw_weights
from training.workers import FinalError, RunError, Workers, exit_process, one_line


class Run:
    """One run on this worker. Everything is built and checked before training starts."""

    def __init__(self, config: DictConfig, workers: Workers):
        self.config, self.workers = config, workers
        on_cuda = workers.device.type == "cuda"
        if on_cuda:  # applies to what the library compiles
            torch.compiler.set_stance("default" if config.compile else "force_eager")
        group = workers.group(config.transport, config.optimizer.get("sync_delay", 0))
        workers.together(self._prepare)  # an error of one worker is raised by all of them here
        self.membership = new_membership(config, workers)
        mesh = None
        if config.ranks_per_worker > 1:
            mesh = new_worker_mesh(config.ranks_per_worker, workers, from_host=group is not None)
        if config.fsdp:
            shard(self.raw_model, mesh)
        draw_weights(self.raw_model, config.seed, workers)
        self.optimizer = build_optimizer(
            config, self.raw_model, group, mesh, self.membership.transport
        )
        self.scheduler = new_scheduler(self.optimizer, config, steps=0)
        self.gradients = GradientComputation(
            self.raw_model,
            self.optimizer,
            workers.device,
            config.precision,
            config.compile,
            config.clip_grad_norm,
        )
        interval = self.membership.stop_check_interval(self.optimizer)
        self.stop_requests = StopRequests(workers, interval)
        self.deferred = DeferredResults(interval // 2)
        self.tokens_per_step = config.batch.global_size * self.raw_model.config.context
        own_tokens = self.tokens_per_step // (config.membership.workers or 1)
        self.progress = Progress(workers, self.optimizer, own_tokens, self.membership.synced_steps)

    def _prepare(self) -> None:
        """Build what a worker needs from its own node: data, model, and classes by name."""
        if self.config.fsdp and self.config.ranks_per_worker == 1:
            raise RunError(
                "fsdp=true needs workers of several ranks: give ranks_per_worker=2 or more"
            )
        model_config = build(self.config.model, "model")
        self.batch_source = BatchSource(self.config, model_config.context, self.workers)
        with torch.device("meta"):
            self.raw_model = GPT(model_config)
        require_parts(self.config, self.raw_model)

    def step(self) -> torch.Tensor:
        """Take a training step; return this worker's mean loss before it."""
        with self.optimizer.timer("data"):
            batch = self.batch_source.next_batch()
        compute_gradient = partial(self.gradients.compute, batch)
        loss = None if self.gradients.needs_closure else compute_gradient()
        self.stop_requests.ask()
        if self.gradients.needs_closure:
            loss = self.optimizer.step(compute_gradient)
        else:
            self.optimizer.step()
        self.raw_model.zero_grad()  # in all layers, also in those that another rank steps
        self.scheduler.step()
        self.membership.catch_up(self)
        return loss

    def watched_step(self) -> int:
        """Take a training step under the watchdog; return the number of steps taken so far."""
        if due(self.scheduler.last_epoch + 1, self.config.diagnostics_every):
            self.optimizer.watch = True
        with self.membership.watchdog("step"):
            self.progress.count_step(self.step())
        step = self.scheduler.last_epoch  # the other workers' step, if this one has caught up
        if step >= self.config.steps:
            self.optimizer.final_sync()
        return step

    def test_loss(self) -> float:
        """The mean loss of W, the model that all workers share, on the test windows."""
        with self.membership.watchdog("evaluation"):
            total, tokens = self.gradients.loss_sum(self.batch_source.test_batches())
        total, tokens = self.workers.sum(total, tokens)
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
        """Run the training loop.

        Returns the facts of the end record, or None if the run was asked to stop before its end.
        """
        config, progress = self.config, self.progress
        self.membership.join(self)
        progress.start_clock()
        test_loss = None
        while self.scheduler.last_epoch < config.steps:
            lr = self.scheduler.get_last_lr()[0]
            step = self.watched_step()
            last = step >= config.steps
            evaluate = last or due(step, config.eval.every)
            save = last or due(step, config.checkpoint.every)
            record = evaluate or save or due(step, config.log_every)
            # Answers of other workers arrive while this one trains on. All workers collect them
            # at the same steps and in one order: first whether to stop, then the losses of train
            # records, oldest first. All have been collected before an evaluation or a checkpoint.
            self.stop_requests.collect(at_once=evaluate or save)
            self.deferred.collect(step, at_once=evaluate or save)
            save |= self.stop_requests.requested
            log.advance(step)
            self.membership.report(log)
            self.diagnose(step, log)
            if save or due(step, config.check_every):
                self.check()
            if not (record or save):
                continue

            progress.update_times()
            if record:
                facts = self.position() | {"lr": lr, "phases": progress.rounded_phases}
                self.deferred.add(step, progress.start_record(facts, log.train))
            else:  # a stop between two records: the next one is written after the run resumes
                progress.require_finite()
            self.deferred.collect(step, at_once=evaluate or save)
            if evaluate:
                test_loss = self.test_loss()
                log.eval(self.position() | {"test_loss": test_loss})
            if save and config.checkpoint.every:
                self.save(log, checkpoints)
            checkpoints.poll()
            if self.stop_requests.requested and not last:
                return None
            if evaluate or save:  # which is no training time
                progress.start_clock()
                self.stop_requests.restart_clock()
        return self.finish(log, test_loss)

    def finish(self, log: RunLog | NoLog, test_loss: float | None) -> dict:
        """After the last step: wait for workers that are late; return the end record's facts.

        test_loss: None on a worker that joined only after the others' last step.
        """
        late = test_loss is None
        test_loss = self.test_loss() if late else test_loss
        self.membership.wait_for_peers(self, log, test_loss if late else None)
        return self.position() | {
            "test_loss": test_loss,
            "uncompressed_bytes": self.config.steps * 4 * self.raw_model.config.parameter_count,
            "optimizer_share": round(self.progress.optimizer_share, 4),
            **self.membership.end_facts(),
        }

    def gather_within_worker(self, value) -> list:
        """The values of all ranks of the first worker; just this rank's if workers have one."""
        size = self.config.ranks_per_worker
        return self.workers.gather(value)[:size] if size > 1 else [value]

    def label(self) -> str:
        """The name of the run in figures. All workers have to call this."""
        return self.config.label or run_label(self.optimizer, self.gather_within_worker)

    def diagnose(self, step: int, log: RunLog | NoLog) -> None:
        """Record what compression did, as soon as every layer of a worker has sent a message."""
        if not (self.config.diagnostics_every and self.optimizer.watch):
            return
        seen = self.gather_within_worker(
            self.optimizer.diagnostics() if self.optimizer.watched else None
        )
        if None not in seen:
            log.diagnostics(step, {name: one for rank in seen for name, one in rank.items()})
            self.optimizer.watch = False

    def check(self) -> None:
        """Raise RunError if the workers have diverged, or if state was lost."""
        self.workers.together(self.optimizer.check_agreement)

    def save(self, log: RunLog | NoLog, checkpoints: Checkpoints) -> None:
        """Write a checkpoint."""
        with self.membership.watchdog("checkpoint"):
            tensors, facts = checkpoint_of(self)
            log_bytes = self.workers.together(log.size)
            checkpoints.save(self.scheduler.last_epoch, tensors, facts | {"log_bytes": log_bytes})


def run_job(job: Job, directory: Path, workers: Workers) -> bool:
    """One run, from its configuration to its picture. Returns whether it has taken all its steps.

    Raises RunError, on all workers alike.
    """
    config = job.config
    run = workers.together(lambda: Run(config, workers))
    require_same_inputs(config, run.batch_source.streams, workers)
    workers.say(introduction(run))
    checkpoints = Checkpoints(
        directory / "checkpoints", workers, config.checkpoint.keep, config.checkpoint.asynchronous
    )
    resumed = resume(run, checkpoints, directory)
    new_log = partial(RunLog, directory, job, run.label(), run_facts(run), resumed)
    log = workers.together(new_log if workers.first else NoLog)
    end = None
    try:
        with workers.stoppable():
            with suppress(StoppedWhileWaiting), run.membership.end_if_refused(log):
                end = run.train(log, checkpoints)
            checkpoints.wait()
    except BaseException as error:
        with suppress(OSError):  # the disk may be full, which the error says then
            log.end("failed", error=one_line(error))
        if isinstance(error, RunError):  # raised by all workers
            checkpoints.wait()
        raise
    finally:
        run.membership.leave()
    if end is None:
        log.end("stopped", step=run.scheduler.last_epoch)
        workers.say(f"\nstopped as asked: {how_to_resume(config, directory)}")
    elif workers.first:
        log.end("completed", **end)
        workers.say(f"\n{result_table(end)}\n\nlog      {log.path}")
        show_picture(directory, workers)
    return end is not None


def show_picture(directory: Path, workers: Workers) -> None:
    """Draw a completed run; print where the picture is, or why there is none."""
    try:
        from training.picture import draw  # imports matplotlib, which other workers do not need

        workers.say(f"picture  {draw([directory], directory)[0]}")
    except (Exception, SystemExit) as error:  # whatever it is, the run is complete
        workers.say(
            f"warning: matplotlib has drawn no picture ({one_line(error)}): the log is complete, "
            f"draw it later with python scripts/figures.py {directory}",
            error=True,
        )


def main() -> int:
    try:
        arguments = parse_arguments()
    except RunError as error:
        return Workers().run(partial(fail, FinalError(str(error))))
    workers = Workers(arguments.timeout)

    def work() -> int:
        try:
            return run_jobs(arguments, workers, Run, run_job)
        except RunError as error:
            if workers.training:
                raise
            raise FinalError(str(error)) from error  # a restart would meet the same error

    return workers.run(work)


if __name__ == "__main__":
    exit_process(main())
