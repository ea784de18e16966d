"""Checkpoints: folders that appear under their name when complete, and are checked before use.

A checkpoint consists of what torch.distributed.checkpoint writes (one file per rank, with tensors
only) and checkpoint.json: schema, step, facts of the run, and the SHA-256 of these and of every
other file. All ranks use one folder of checkpoints: several nodes need a file system that they
share. Loading unpickles nothing but tensors and the tables of torch.distributed.checkpoint.
"""

import hashlib
import json
import os
import pickle
import re
import shutil
import sys
import warnings
from collections.abc import Iterable
from concurrent.futures import Future
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from training.workers import RunError, Workers, one_line

SCHEMA = 1
FACTS = "checkpoint.json"
PARTIAL = ".partial"
# A process without a group saves alone, and every process loads alone, as intended.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable")


class Checkpoints:
    """The checkpoints of one run, in `folder`. The last `keep` of them are kept.

    With `asynchronous`, `save` copies the state and returns while the files are written. The
    checkpoint appears in the first `poll` that finds all of them written, in `wait`, or in the next
    `save`.
    """

    def __init__(self, folder: Path, workers: Workers, keep: int, asynchronous: bool = False):
        self.folder, self.workers = folder, workers
        self.keep, self.asynchronous = keep, asynchronous
        self._pending: tuple[Path, dict, Future] | None = None
        self._damaged: set[str] = set()
        self._group = workers.control
        if asynchronous and dist.is_initialized():  # the training uses its own at the same time
            self._group = dist.new_group(backend="gloo", timeout=workers.timeout)

    def save(self, step: int, tensors: dict[str, Tensor], facts: dict) -> None:
        """Write a checkpoint of all ranks.

        Raises RunError if it cannot be written; earlier checkpoints stay as they are.

        tensors: tensors of the same name are equal on all ranks. facts: rank 0's, for JSON.
        """
        self.wait()
        partial = self.folder / f"step-{step:08}{PARTIAL}"
        facts = {"schema": SCHEMA, "step": step, **facts}
        try:
            self.workers.together(lambda: self._make(partial))
            if self.asynchronous:
                future = dcp.async_save(tensors, **self._where(partial))
                self._pending = partial, facts, future
            else:
                self.workers.together(lambda: self._write(tensors, partial))
                self._publish(partial, facts)
        except RunError as error:
            self._give_up(partial, error)

    def poll(self) -> None:
        """Publish an asynchronous checkpoint if all ranks have written it; else do nothing."""
        if self._pending:
            (waiting,) = self.workers.sum(float(not self._pending[2].done()))
            if not waiting:
                self.wait()

    def wait(self) -> None:
        """Wait for an asynchronous checkpoint that is being written, and publish it."""
        if not self._pending:
            return
        partial, facts, future = self._pending
        self._pending = None
        try:
            self.workers.together(lambda: _without_checkpoint_exception(future.result))
            self._publish(partial, facts)
        except RunError as error:
            self._give_up(partial, error)

    def newest(self) -> Path | None:
        """The newest complete checkpoint, the same on all ranks, or None if there is none yet.

        Damaged checkpoints are printed and ignored. Raises RunError if all are damaged.
        """
        names = self.workers.broadcast([path.name for path in self._complete()])
        for name in reversed(names):
            try:
                self.workers.together(lambda path=self.folder / name: self._verify(path))
                return self.folder / name
            except RunError as error:
                self.workers.say(f"ignored a damaged checkpoint: {error}", error=True)
                self._damaged.add(name)
        if names:
            raise RunError(
                f"every checkpoint in {self.folder} is damaged: remove the folder to start anew"
            )
        return None

    def _complete(self) -> list[Path]:
        return [path for path in own_folders(self.folder) if path.suffix != PARTIAL]

    def _make(self, partial: Path) -> None:
        if self.workers.first:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)

    def _where(self, partial: Path) -> dict:
        return {
            "storage_writer": TensorWriter(partial),
            "process_group": self._group,
            "no_dist": self._group is None,
        }

    def _write(self, tensors: dict[str, Tensor], partial: Path) -> None:
        _without_checkpoint_exception(lambda: dcp.save(tensors, **self._where(partial)))

    def _publish(self, partial: Path, facts: dict) -> None:
        """Hash the files, add the facts, and give the folder its name."""
        mine = self.workers.together(
            lambda: {path.name: _sha256(path) for path in self._my_files(partial)}
        )
        hashes = {
            name: digest for part in self.workers.gather(mine) for name, digest in part.items()
        }
        self.workers.together(lambda: self._rename(partial, facts | {"files": hashes}))

    def _rename(self, partial: Path, facts: dict) -> None:
        if not self.workers.first:
            return
        with (partial / FACTS).open("w") as file:
            json.dump(seal(facts), file)
            file.flush()
            os.fsync(file.fileno())
        _sync_folder(partial)
        final = partial.with_name(partial.name.removesuffix(PARTIAL))
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        _sync_folder(self.folder)
        self._damaged.discard(final.name)
        whole = [path for path in self._complete() if path.name not in self._damaged]
        remove({*own_folders(self.folder)}.difference(whole[-self.keep :]))

    def _give_up(self, partial: Path, error: RunError) -> None:
        if self.workers.first:
            shutil.rmtree(partial, ignore_errors=True)
        raise RunError(
            f"the checkpoint {partial.name.removesuffix(PARTIAL)} could not be written: {error}; "
            f"earlier ones in {self.folder} are as they were: see to the disk, and resume with "
            "resume=auto"
        ) from error

    def _verify(self, path: Path) -> None:
        """Raise RunError or OSError unless this rank's share of the files is as it was written."""
        facts = read_facts(path)
        for name in sorted(facts["files"])[self.workers.rank :: self.workers.count]:
            if not _inside(path, name) or _sha256(path / name) != facts["files"][name]:
                raise RunError(f"{path / name} is not what was written")

    def _my_files(self, partial: Path) -> list[Path]:
        own = sorted(partial.glob(f"__{self.workers.rank}_*"))
        return [*own, partial / ".metadata"] if self.workers.first else own


def own_folders(folder: Path) -> list[Path]:
    """The checkpoints in a folder, complete or not, by step. Other files are left out."""
    named = re.compile(rf"step-\d{{8,}}({re.escape(PARTIAL)})?")
    paths = folder.iterdir() if folder.is_dir() else ()
    return sorted(path for path in paths if named.fullmatch(path.name))


def remove(folders: Iterable[Path]) -> None:
    """Remove checkpoints. One that cannot be removed is printed and left."""
    for folder in folders:
        try:
            shutil.rmtree(folder)
        except OSError as error:
            print(f"left an old checkpoint: {one_line(error)}", file=sys.stderr)


def read_facts(path: Path) -> dict:
    """checkpoint.json of a checkpoint. Raises RunError if it is damaged or of another schema."""
    try:
        facts = json.loads((path / FACTS).read_text())
        schema, _ = facts["schema"], facts["files"].items()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(f"{path / FACTS} is damaged: {one_line(error)}") from error
    if schema != SCHEMA:
        raise RunError(
            f"{path} has schema {schema}, this version reads {SCHEMA}: "
            "use the version that wrote it"
        )
    if seal(facts) != facts:
        raise RunError(f"{path / FACTS} is not what was written")
    return facts


def seal(facts: dict) -> dict:
    """The facts, with their SHA-256 among them."""
    others = {key: value for key, value in facts.items() if key != "sha256"}
    return others | {"sha256": hashlib.sha256(json.dumps(others).encode()).hexdigest()}


def load(path: Path, tensors: dict[str, Tensor]) -> None:
    """Fill the tensors, in place, from a checkpoint. Raises RunError if it lacks one."""
    try:
        dcp.load(tensors, storage_reader=TensorReader(path), no_dist=True)
    except (CheckpointException, KeyError, RuntimeError) as error:
        cause = _first_failure(error) if isinstance(error, CheckpointException) else error
        raise RunError(
            f"{path} does not fit this run: {one_line(cause)}; give this run's own directory"
        ) from error


def stored_tensors(path: Path) -> dict[str, TensorStorageMetadata]:
    """The sizes and types of the tensors in a checkpoint, by name."""
    return TensorReader(path).read_metadata().state_dict_metadata


class TensorWriter(dcp.FileSystemWriter):
    """Raises the error of the disk, where torch.save raises one of its own after it."""

    def write_data(self, *args, **kwargs):
        try:
            return super().write_data(*args, **kwargs)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


class TensorReader(dcp.FileSystemReader):
    """Reads checkpoints that hold only tensors, without unpickling anything else."""

    def read_metadata(self, *args, **kwargs) -> Metadata:
        with (Path(self.path) / ".metadata").open("rb") as file:
            metadata = _TableUnpickler(file).load()
        for stored in metadata.storage_data.values():
            if not _inside(Path(self.path), stored.relative_path):
                raise RunError(f"{self.path} refers to {stored.relative_path}, outside of it")
        return metadata


class _TableUnpickler(pickle.Unpickler):
    """Unpickles the tables of torch.distributed.checkpoint, and nothing that could run code."""

    TABLES = "torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem"
    NAMES = (
        *("Metadata", "MetadataIndex", "StorageMeta", "TensorStorageMetadata", "_StorageInfo"),
        *("TensorProperties", "ChunkStorageMetadata", "_MEM_FORMAT_ENCODING"),
    )

    def find_class(self, module: str, name: str):
        if module in self.TABLES and name in self.NAMES:
            return super().find_class(module, name)
        if (module, name) in (("torch", "Size"), ("torch.serialization", "_get_layout")):
            return super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if (module, name) in (("pathlib", "PosixPath"), ("pathlib._local", "PosixPath")):
            return Path
        raise pickle.UnpicklingError(f"{module}.{name} does not belong in a checkpoint")


def _without_checkpoint_exception(action) -> None:
    """Call the action. A CheckpointException becomes a RunError with one rank's error."""
    try:
        action()
    except CheckpointException as error:
        raise RunError(one_line(_first_failure(error))) from error


def _first_failure(error: CheckpointException) -> BaseException:
    rank = min(error.failures)
    return error.failures[rank][0]


def _inside(folder: Path, name: str) -> bool:
    return (folder / name).resolve().parent == folder.resolve()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
