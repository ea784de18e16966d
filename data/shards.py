"""The token file format of llm.c and modded-nanogpt.

A shard is a header of 256 int32 (magic 20240520, version 1, number of tokens, zeros) followed by
the tokens as uint16, everything little-endian.
"""

import os
from pathlib import Path

import numpy as np

from data.files import whole_file

MAGIC = 20240520
VERSION = 1
HEADER_ENTRIES = 256
HEADER_BYTES = 4 * HEADER_ENTRIES
TOKEN_BYTES = 2


class ShardError(ValueError):
    """A shard is missing, damaged or foreign; the message ends with the command to rebuild it."""

    def __init__(self, path: Path | str, problem: str, rebuild: str):
        super().__init__(f"{path}: {problem}; rebuild with: {rebuild}")


def write_shard(path: Path | str, tokens: np.ndarray) -> None:
    """Write `tokens`, integers of shape (tokens,), so that `path` never names a half-written file.

    Raises ValueError if there are no tokens or one of them does not fit uint16.
    """
    path = Path(path)
    tokens = np.asarray(tokens)
    if tokens.ndim != 1 or tokens.size == 0 or not np.issubdtype(tokens.dtype, np.integer):
        raise ValueError(
            f"{path}: tokens have shape {tokens.shape} and type {tokens.dtype}: "
            "give one dimension of at least one integer"
        )
    smallest, largest = int(tokens.min()), int(tokens.max())
    if smallest < 0 or largest > 65535:
        raise ValueError(
            f"{path}: tokens range from {smallest} to {largest}: give tokens from 0 to 65535"
        )
    header = np.zeros(HEADER_ENTRIES, dtype="<i4")
    header[:3] = MAGIC, VERSION, tokens.size

    with whole_file(path) as file:
        file.write(header)
        file.write(np.ascontiguousarray(tokens, dtype="<u2"))


def open_shard(path: Path | str, rebuild: str) -> np.ndarray:
    """Return the tokens of a shard as a read-only uint16 memory map of shape (tokens,).

    `rebuild` is the command that makes the file again. Raises ShardError if the file is missing,
    cannot be read, is no shard, holds no tokens, or is longer or shorter than its header says.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            header = np.frombuffer(file.read(HEADER_BYTES), dtype=np.uint8)
            size = os.fstat(file.fileno()).st_size
    except FileNotFoundError as error:
        raise ShardError(path, "no such file", rebuild) from error
    except OSError as error:
        raise ShardError(path, f"cannot be read ({error.strerror})", rebuild) from error
    if len(header) < HEADER_BYTES:
        problem = f"{size} bytes, shorter than the header of {HEADER_BYTES} bytes"
        raise ShardError(path, problem, rebuild)
    magic, version, count = header.view("<i4")[:3].tolist()
    if magic != MAGIC:
        raise ShardError(path, f"magic number {magic}, expected {MAGIC}", rebuild)
    if version != VERSION:
        raise ShardError(path, f"format version {version}, expected {VERSION}", rebuild)
    expected_size = HEADER_BYTES + TOKEN_BYTES * count
    if size != expected_size:
        problem = f"{size} bytes, expected {expected_size} for the {count} tokens of its header"
        raise ShardError(path, problem, rebuild)
    if count == 0:
        raise ShardError(path, "0 tokens, expected at least 1", rebuild)
    return np.memmap(path, dtype="<u2", mode="r", offset=HEADER_BYTES, shape=(count,))
