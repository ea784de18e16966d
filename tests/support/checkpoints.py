"""Checkpoints of a few tensors: saved, looked at, and damaged."""

import hashlib
import json
from pathlib import Path

import torch

from training.checkpoint import Checkpoints, load, seal
from training.workers import Workers

FIRST, SECOND, THIRD = (f"step-0000000{step}" for step in (1, 2, 3))


def tensors(step: int) -> dict[str, torch.Tensor]:
    """Of several kinds; some are views of others' memory, as an optimizer's are."""
    generator = torch.Generator().manual_seed(step)
    batch = torch.randn(3, 40, 50, generator=generator)
    return {
        "first": batch[0],
        "last": batch[2],
        "half": batch[0].bfloat16(),
        "scalar": torch.tensor(float(step)),
        "generator": generator.get_state(),
    }


def saved(folder: Path, *steps: int, **options) -> Checkpoints:
    checkpoints = Checkpoints(folder, Workers(), **{"keep": 2, **options})
    for step in steps:
        checkpoints.save(step, tensors(step), {})
    return checkpoints


def newest(folder: Path) -> Path | None:
    """For a process that comes later."""
    return Checkpoints(folder, Workers(), keep=2).newest()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def hashes(path: Path) -> dict[str, str]:
    """Of the tensors' files."""
    return {file.name: sha256(file) for file in path.glob("*.distcp")}


def require_whole(path: Path, step: int) -> None:
    found = {name: torch.zeros_like(tensor) for name, tensor in tensors(step).items()}
    load(path, found)
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors(step).items())


def flip(path: Path, place: float) -> None:
    content = bytearray(path.read_bytes())
    content[int(place * len(content))] ^= 16
    path.write_bytes(content)


def rewrite_facts(path: Path, **changed) -> None:
    facts = json.loads((path / "checkpoint.json").read_text())
    (path / "checkpoint.json").write_text(json.dumps(seal(facts | changed)))
