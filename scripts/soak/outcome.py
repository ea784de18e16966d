"""What a run comes to, and whether a checkpoint is as it was written."""

import hashlib
import json
from contextlib import suppress
from pathlib import Path

from training.checkpoint import read_facts
from training.workers import RunError

VARYING = ("seconds", "phases", "started", "optimizer_share", "config", "overrides", "commit")


def outcome(directory: Path) -> tuple[list[dict], dict[str, str]]:
    """What equal runs have in common: the log without times, the last checkpoint's SHA-256s."""
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    log = [{k: v for k, v in json.loads(line).items() if k not in VARYING} for line in lines]
    last = max((directory / "checkpoints").glob("step-????????"))
    return log, {file.name: sha256(file) for file in last.glob("*.distcp")}


def is_whole(checkpoint: Path) -> bool:
    """Whether all its files are as they were written."""
    with suppress(OSError, RunError):
        files = read_facts(checkpoint)["files"]
        return all(sha256(checkpoint / name) == digest for name, digest in files.items())
    return False


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
