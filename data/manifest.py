"""manifest.json: what a directory of FineWeb shards was made from and has to hold."""

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from data.files import whole_file
from data.shards import ShardError, open_shard

FILE_NAME = "manifest.json"


def shard_paths(
    directory: Path, shards: int, prefix: str = "fineweb"
) -> tuple[list[Path], list[Path]]:
    """Return the paths of the first `shards` training shards, and of the test shard in a list."""
    train = [directory / f"{prefix}_train_{index:06d}.bin" for index in range(1, shards + 1)]
    return train, [directory / f"{prefix}_val_000000.bin"]


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file as 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass
class Manifest:
    """The record of a directory of shards, kept in it as manifest.json.

    `source` says what the tokens are made from and `rebuild` with which command. `train_shards`
    training shards beside the test shard make the set complete; it is None while the number is
    not known yet. `shards` maps the name of every finished file to its `tokens`, its `sha256` and
    where it comes from. Names begin with the `prefix`.
    """

    directory: Path
    source: dict
    rebuild: str
    train_shards: int | None = None
    shards: dict[str, dict] = field(default_factory=dict)
    prefix: str = "fineweb"

    @classmethod
    def read(cls, directory: Path) -> "Manifest":
        """Raises ShardError if there is no manifest or it is not one."""
        path = directory / FILE_NAME
        remedy = "python data/fineweb.py download (or tokenize), with the same --dataset and --out"
        if not path.is_file():
            raise ShardError(path, "no such file", remedy)
        try:
            return cls(directory, **json.loads(path.read_bytes()))
        except (ValueError, TypeError) as error:
            raise ShardError(path, f"not a manifest ({error})", f"rm {path}; {remedy}") from error

    @classmethod
    def start(
        cls, directory: Path, source: dict, rebuild: str, prefix: str = "fineweb"
    ) -> "Manifest":
        """Return the manifest that is there, or an empty one.

        Raises ValueError if the one that is there lists shards of another source.
        """
        new = cls(directory, source, rebuild, prefix=prefix)
        manifest = cls.read(directory) if (directory / FILE_NAME).is_file() else new
        if not manifest.shards:
            return new
        for key in source | manifest.source:
            there, here = manifest.source.get(key), source.get(key)
            if there != here:
                raise ValueError(
                    f"{directory} holds shards of another source ({key} is {there} there and "
                    f"{here} here): give another folder with --out, or remove this one"
                )
        manifest.rebuild = rebuild
        return manifest

    def save(self) -> None:
        """Write manifest.json, so that it is never there half-written."""
        content = asdict(self)
        del content["directory"]
        with whole_file(self.directory / FILE_NAME, "w") as file:
            json.dump(content, file, indent=1)

    def record(self, name: str, **origin) -> None:
        """Enter the shard `name`, which is in place, and save. Raises ShardError if it is none."""
        path = self.directory / name
        tokens = len(open_shard(path, self.rebuild))
        self.shards[name] = {"tokens": tokens, "sha256": sha256(path), **origin}
        self.save()

    def check(self, name: str) -> None:
        """Raise ShardError unless the shard `name` is in place and is the one recorded."""
        path = self.directory / name
        tokens = len(open_shard(path, self.rebuild))
        if name not in self.shards:
            raise ShardError(path, f"not in {FILE_NAME}", self.rebuild)
        expected = self.shards[name]
        if tokens != expected["tokens"]:
            problem = f"{tokens} tokens, expected {expected['tokens']}"
            raise ShardError(path, problem, self.rebuild)
        digest = sha256(path)
        if digest != expected["sha256"]:
            problem = f"SHA-256 {digest}, expected {expected['sha256']}"
            raise ShardError(path, problem, self.rebuild)

    def names(self) -> list[str]:
        """Return the names of all shards that have to be there or are there, in sorted order."""
        train, test = shard_paths(self.directory, self.train_shards or 0, self.prefix)
        expected = {path.name for path in test + train}
        present = {path.name for path in self.directory.glob(f"{self.prefix}_*.bin")}
        return sorted(expected | present | set(self.shards))
