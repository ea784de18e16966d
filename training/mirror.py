"""The copy of a run's numbers in wandb. The run does not depend on it, and does not wait for it."""

import os
import re
import secrets
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from queue import Full, Queue

from training.console import write_line
from training.records import LOG_NAME
from training.workers import RunError, one_line

SERVICE = "WANDB_SERVICE"  # the variable by which wandb and child processes find its service
ID_FILE = "wandb_id"  # in the run's directory, for when the run is resumed
MOST_WAITING = 10_000  # records that wandb has not taken, after which it counts as hanging
PATIENCE = 120.0  # seconds for wandb to finish after a run that is complete
SHORT_PATIENCE = 10.0  # the same after a run that was stopped, and may be killed soon


class Mirror:
    """A run of wandb. No call fails, and only `finish` waits. A line warns if the run is lost.

    A new run gets a new id, and a `resumed` run takes the id in its directory. Raises RunError if
    wandb does not start for a new run.
    """

    def __init__(self, config: dict, directory: Path, label: str, resumed: bool):
        self.directory = directory
        self._problem: str | None = None
        self._given_up = False
        self._tasks: Queue[Callable[[], None] | None] = Queue(MOST_WAITING)
        self._done = threading.Event()
        try:
            self._run = _start(config, directory, label, _run_id(directory, resumed))
        except (Exception, SystemExit) as error:
            mode = config["wandb"]["mode"]
            problem = f"wandb.mode={mode} does not start ({one_line(error)})"
            if not resumed:
                other = "offline" if mode == "online" else "disabled"
                raise RunError(
                    f"{problem}: give wandb.mode={other}, and upload later with scripts/to_wandb.py"
                ) from error
            self._give_up(problem)
        else:
            threading.Thread(target=self._work, daemon=True).start()

    def log(self, numbers: dict, step: int) -> None:
        """Send the numbers of a step, after those of earlier calls."""
        self._add(lambda: self._run.log(numbers, step=step))

    def finish(self, status: str) -> None:
        """Wait a while for wandb to finish. status: that of the end record."""
        self._add(lambda: self._run.finish(exit_code=1 if status == "failed" else 0))
        self._add(None)
        patience = PATIENCE if status == "completed" else SHORT_PATIENCE
        if not self._given_up and not self._done.wait(patience):
            self._give_up(f"wandb did not end within {patience:g} s")
        self._look()

    def _add(self, task: Callable[[], None] | None) -> None:
        self._look()
        if self._given_up:
            return
        try:
            self._tasks.put_nowait(task)
        except Full:
            self._give_up(f"wandb has not taken {MOST_WAITING} records")

    def _work(self) -> None:
        try:
            while task := self._tasks.get():
                task()
        except BaseException as error:  # wandb may raise anything
            self._problem = one_line(error)
        self._done.set()

    def _look(self) -> None:
        if self._problem and not self._given_up:
            self._give_up(f"wandb stopped answering ({self._problem})")

    def _give_up(self, problem: str) -> None:
        self._given_up = True
        write_line(
            f"warning: {problem}: the log is in {self.directory / LOG_NAME}, upload it later with "
            f"python scripts/to_wandb.py {self.directory}",
            error=True,
        )


class NoMirror:
    """Stands in for a Mirror that was not asked for."""

    def log(self, numbers: dict, step: int) -> None: ...

    def finish(self, status: str) -> None: ...


def init(**options):
    """Call wandb.init, also if the service of an earlier run in this process is lost."""
    import wandb

    try:
        return wandb.init(**options)
    except Exception:
        if os.environ.pop(SERVICE, None) is None:
            raise
        with suppress(Exception):  # it raises once more that the service is lost
            wandb.teardown()
        return wandb.init(**options)


def _start(config: dict, directory: Path, label: str, run_id: str):
    run = init(
        project=config["wandb"]["project"],
        mode=config["wandb"]["mode"],
        name=label,
        dir=directory,
        config=config,
        id=run_id,
        resume="allow",
        settings={"console": "off"},  # otherwise wandb captures every printed line
    )
    (directory / ID_FILE).write_text(run_id)
    return run


def _run_id(directory: Path, resumed: bool) -> str:
    path = directory / ID_FILE
    known = path.read_text() if resumed and path.exists() else ""
    return known if re.fullmatch(r"[\w-]+", known) else secrets.token_hex(8)
