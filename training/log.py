"""A run's log: metrics.jsonl, the progress bar, and wandb when asked for. Rank 0 only."""

import json
import os
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path

import numpy
import torch
from omegaconf import OmegaConf

from training.checkpoint import own_folders, remove
from training.config import ROOT, Job
from training.console import Display, write_line
from training.mirror import Mirror, NoMirror
from training.records import LOG_NAME, SCHEMA, traffic
from training.renamed import modern_config
from training.workers import RunError

GIT_SECONDS = 10.0  # for git to say which commit it is


class RunLog:
    """Writes `metrics.jsonl` into `directory` and shows progress.

    Byte fields are cumulative and per worker; `seconds` is training time without evaluations. The
    file is flushed at every evaluation, before every checkpoint, and at the end. If workers come
    and go, it is also flushed at every round.

    A new log replaces an old one and its checkpoints. With `resumed`, the facts of a checkpoint,
    the log continues behind the records that the checkpoint knew, and later records are cut off.

    Raises ValueError if those records are missing. Raises RunError, before anything changes, if
    wandb does not start for a new run.
    """

    def __init__(self, directory: Path, job: Job, label: str, facts: dict, resumed: dict | None):
        config = OmegaConf.to_container(job.config, resolve=True)
        self.path = directory / LOG_NAME
        self._mirror = NoMirror()
        try:
            directory.mkdir(parents=True, exist_ok=True)
            if config["wandb"]["mode"] != "disabled":
                self._mirror = Mirror(config, directory, label, resumed=resumed is not None)
            if resumed:
                self._file = _cut(self.path, resumed["log_bytes"])
            else:
                self._file = self.path.open("w")
                remove(own_folders(directory / "checkpoints"))
            OmegaConf.save(job.config, directory / "config.yaml", resolve=True)
        except OSError as error:
            raise RunError(
                f"the run directory {directory} cannot be written ({error.strerror}): give another "
                "with directory= or runs="
            ) from error
        self._parameters = facts["parameters"]
        self._display = Display(config["steps"], resumed["step"] if resumed else 0)
        before = resumed["position"] if resumed else {"tokens": 0, "seconds": 0.0}
        self._last = before["tokens"], before["seconds"]
        if resumed:
            self._note_resumption(resumed, facts)
            return
        self._write(
            {
                "record": "run",
                "schema": SCHEMA,
                "label": label,
                "overrides": list(job.overrides),
                "config": config,
                **facts,
                "versions": {
                    "python": platform.python_version(),
                    "torch": torch.__version__,
                    "numpy": numpy.__version__,
                },
                "commit": _commit(),
                "started": datetime.now(UTC).isoformat(timespec="seconds"),
            }
        )
        self._flush()

    def _note_resumption(self, resumed: dict, facts: dict) -> None:
        """Record a resume with other workers; an exact resume leaves no trace in the log."""
        if "resync_bytes" in resumed:
            self._write(
                {
                    "record": "elastic",
                    "step": resumed["step"],
                    "world_size_before": resumed["workers"],
                    "world_size": facts["world_size"],
                    "placement_before": resumed["placement"],
                    "placement": facts["placement"],
                    "resync_bytes": resumed["resync_bytes"],
                }
            )

    def size(self) -> int:
        """The bytes of the records so far, once all of them are on disk."""
        self._flush()
        os.fsync(self._file.fileno())
        return self._file.tell()

    def advance(self, step: int) -> None:
        """Move the progress bar to this step."""
        self._display.advance(step)

    def train(self, record: dict) -> None:
        """Write a record of the training since the last one."""
        self._write({"record": "train", **record})
        now = record["tokens"], record["seconds"]
        tokens, seconds = (new - old for new, old in zip(now, self._last, strict=True))
        tokens_per_second = tokens / seconds if seconds else 0.0
        self._last = now
        self._display.describe(
            record["step"],
            f"loss {record['loss']:.3f}, {tokens_per_second / 1000:.1f}k tokens/s, "
            f"{traffic(record, self._parameters)}",
        )

    def diagnostics(self, step: int, layers: dict[str, dict[str, float]]) -> None:
        """Write what compression did to each layer in a step."""
        self._write({"record": "diagnostics", "step": step, "layers": layers})

    def membership(self, record: dict) -> None:
        """Write which workers took part in a round, if workers come and go."""
        self._write({"record": "membership", **record})
        self._flush()

    def eval(self, record: dict) -> None:
        """Write an evaluation on the test set."""
        self._write({"record": "eval", **record})
        self._flush()
        write_line(
            f"step {record['step']:>6}  test loss {record['test_loss']:.4f}  "
            f"{traffic(record, self._parameters)}"
        )

    def end(self, status: str, **facts) -> None:
        """Write the last record: `completed`, `stopped`, or `failed` with an `error`."""
        self._write({"record": "end", "status": status, **facts})
        self._file.close()
        self._display.close()
        self._mirror.finish(status)

    def _flush(self) -> None:
        try:
            self._file.flush()
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from error

    def _write(self, record: dict) -> None:
        self._file.write(json.dumps(record) + "\n")
        if record["record"] in ("train", "eval"):
            numbers = {key: value for key, value in record.items() if key not in ("record", "step")}
            self._mirror.log(numbers, step=record["step"])


class NoLog:
    """Stands in for a RunLog on ranks that write no log."""

    def size(self) -> None: ...

    def advance(self, step: int) -> None: ...

    def train(self, record: dict) -> None: ...

    def diagnostics(self, step: int, layers: dict[str, dict[str, float]]) -> None: ...

    def membership(self, record: dict) -> None: ...

    def eval(self, record: dict) -> None: ...

    def end(self, status: str, **facts) -> None: ...


def completed(directory: Path) -> dict | None:
    """The configuration of the run in a directory, if its log says that it completed; else None."""
    path = directory / LOG_NAME
    if not path.exists():
        return None
    try:
        records = path.read_bytes().splitlines()
        run, end = json.loads(records[0]), json.loads(records[-1])
        completed_it = (end["record"], end["status"]) == ("end", "completed")
        return modern_config(run["config"]) if completed_it else None
    except (ValueError, LookupError, TypeError):  # it was cut off, or damaged
        return None


def _cut(path: Path, size: int):
    """The file, cut to its first `size` bytes and open for writing behind them.

    Raises ValueError if it is shorter.
    """
    if not path.exists() or path.stat().st_size < size:
        raise ValueError(
            f"{path} is shorter than the {size} bytes that the checkpoint knew: put it back, or "
            "remove the checkpoints to start anew"
        )
    file = path.open("r+")
    file.truncate(size)
    file.seek(size)
    return file


def _commit() -> str | None:
    """The commit of the code, with a `+` if files differ from it; None if git finds none."""
    command = ["git", "describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*"]
    try:
        return subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=GIT_SECONDS
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError, ValueError):
        return None
