"""Checkpoints with code where data should be: nothing of it is run."""

import io
import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from checkpoints import FIRST, newest, rewrite_facts, saved, sha256, tensors
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from training.checkpoint import load
from training.workers import RunError


class Touch:
    """Unpickled by pickle itself, it makes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def forge(path: Path, change) -> None:
    """Let `change(metadata)` edit .metadata, and make its hash fit."""
    metadata = FileSystemReader(path).read_metadata()
    change(metadata)
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
    trust(path, ".metadata")


def trust(path: Path, name: str) -> None:
    facts = json.loads((path / "checkpoint.json").read_text())
    rewrite_facts(path, files=facts["files"] | {name: sha256(path / name)})


def refused(folder: Path) -> str:
    """Why the newest checkpoint, whole by its hashes, is not loaded."""
    path = newest(folder)
    assert path == folder / FIRST
    with pytest.raises(RunError) as error:
        load(path, tensors(1))
    return str(error.value)


def test_code_in_the_metadata_is_not_run(tmp_path):
    saved(tmp_path / "run", 1)
    path, proof = tmp_path / "run" / FIRST, tmp_path / "proof"
    forge(path, lambda metadata: setattr(metadata, "planner_data", Touch(proof)))
    assert "posix.system does not belong in a checkpoint" in refused(tmp_path / "run")
    assert not proof.exists()
    FileSystemReader(path).read_metadata()
    assert proof.exists()  # so the metadata was dangerous


def test_code_in_a_tensor_s_place_is_not_run(tmp_path):
    saved(tmp_path / "run", 1)
    path, proof = tmp_path / "run" / FIRST, tmp_path / "proof"
    content = io.BytesIO()
    torch.save(Touch(proof), content)
    (path / "__0_0.distcp").write_bytes(content.getvalue())
    trust(path, "__0_0.distcp")

    def point_there(metadata):
        for stored in metadata.storage_data.values():
            stored.offset, stored.length = 0, len(content.getvalue())

    forge(path, point_there)
    assert "weights_only" in refused(tmp_path / "run").lower() and not proof.exists()

    def make_bytes(metadata):  # which torch.distributed.checkpoint would unpickle freely
        for name in metadata.state_dict_metadata:
            metadata.state_dict_metadata[name] = BytesStorageMetadata()

    forge(path, make_bytes)
    assert "BytesStorageMetadata does not belong in a checkpoint" in refused(tmp_path / "run")
    assert not proof.exists()


@pytest.mark.parametrize("outside", ["../other.distcp", "/etc/hostname", "..", "a/b"])
def test_a_checkpoint_does_not_reach_outside(tmp_path, outside):
    saved(tmp_path, 1)
    shutil.copy(tmp_path / FIRST / "__0_0.distcp", tmp_path / "other.distcp")

    def reach(metadata):
        for stored in metadata.storage_data.values():
            stored.relative_path = outside

    forge(tmp_path / FIRST, reach)
    assert f"refers to {outside}, outside of it" in refused(tmp_path)
