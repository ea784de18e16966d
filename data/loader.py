"""Reading token shards: random training windows of a worker's own part, fixed test windows."""

import glob
import hashlib
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path

import numpy as np
import torch

from data.shards import HEADER_BYTES, TOKEN_BYTES, ShardError, open_shard

SAMPLES, SAMPLE_TOKENS = 16, 32_768  # of a shard, by which it is known: 1 MiB evenly spaced
WHOLE_TOKENS = 16_000_000  # of a shard, up to which it is known by all of them


class TokenStream:
    """Several shards read as one sequence of `len(stream)` tokens, without loading them.

    Raises ShardError if a shard is missing or damaged; `rebuild` is the command that makes it.
    """

    def __init__(self, paths: Sequence[Path | str], vocab_size: int, rebuild: str):
        self.paths = list(paths)
        self.vocab_size = vocab_size
        self.rebuild = rebuild
        self.shards = [open_shard(path, rebuild) for path in self.paths]
        # Shard i holds the tokens bounds[i] .. bounds[i + 1] - 1 of the stream.
        self.bounds = np.cumsum([0, *(len(shard) for shard in self.shards)])

    def __len__(self) -> int:
        return int(self.bounds[-1])

    def read(self, start: int, length: int) -> np.ndarray:
        """Return the tokens start .. start + length - 1 as int64 of shape (length,).

        Raises IndexError outside the stream, ShardError at a token outside the vocabulary and for
        a file that is no longer what was opened.
        """
        if start < 0 or length < 1 or start + length > len(self):
            raise IndexError(
                f"{length} tokens from position {start} wanted: "
                f"give at least 1 token inside a stream of {len(self)}"
            )
        tokens = np.empty(length, dtype=np.int64)
        filled = 0
        index = int(np.searchsorted(self.bounds, start, side="right")) - 1
        while filled < length:
            self._require_unchanged(index)
            offset = start + filled - int(self.bounds[index])
            piece = self.shards[index][offset : offset + length - filled]
            if piece.max() >= self.vocab_size:
                problem = f"token {piece.max()} is outside the vocabulary of {self.vocab_size}"
                raise ShardError(self.paths[index], problem, self.rebuild)
            tokens[filled : filled + len(piece)] = piece
            filled += len(piece)
            index += 1
        return tokens

    def fingerprints(self) -> Iterator[tuple[Path, str]]:
        """Of every shard its path, and its number of tokens with a digest of them.

        Or, where it is large, of SAMPLES of them.
        """
        for index, (path, shard) in enumerate(zip(self.paths, self.shards, strict=True)):
            self._require_unchanged(index)
            digest = hashlib.sha256()
            last = max(0, len(shard) - SAMPLE_TOKENS)
            starts = np.linspace(0, last, SAMPLES, dtype=int)
            if len(shard) <= WHOLE_TOKENS:
                starts = range(0, len(shard), SAMPLE_TOKENS)
            for start in starts:
                digest.update(shard[start : start + SAMPLE_TOKENS].tobytes())
            yield Path(path), f"{len(shard)} tokens with SHA-256 {digest.hexdigest()[:16]}"

    def _require_unchanged(self, index: int) -> None:
        """To read behind the end of a file that was cut would kill the process."""
        path, expected = self.paths[index], HEADER_BYTES + TOKEN_BYTES * len(self.shards[index])
        try:
            size = os.stat(path).st_size
        except OSError as error:
            problem = f"vanished during the run ({error.strerror})"
            raise ShardError(path, problem, self.rebuild) from error
        if size != expected:
            problem = f"{size} bytes, {expected} when the run began"
            raise ShardError(path, problem, self.rebuild)


class WorkerBatches:
    """Random training windows of one worker.

    Worker j of W owns the P = len(stream) // W tokens from position j * P on; the len(stream) % W
    tokens left at the end belong to nobody. Raises ValueError if P is less than one window of
    context + 1 tokens.
    """

    def __init__(self, stream: TokenStream, context: int, worker: int, workers: int, seed: int):
        part = len(stream) // workers
        window = context + 1
        if part < window:
            most = len(stream) // window
            remedy = f"at most {most} workers" if most else f"a context below {len(stream)}"
            raise ValueError(
                f"{len(stream)} training tokens over {workers} workers leave {part} tokens each, "
                f"fewer than one window of {window}: use {remedy}"
            )
        self.stream = stream
        self.context = context
        self.start = worker * part
        self.stop = self.start + part
        self.seed = [seed, worker]
        self.generator = np.random.default_rng(np.random.SeedSequence(self.seed))

    def next(self, sequences: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return inputs and targets, int64 of shape (sequences, context): the next token of each.

        The windows lie inside the worker's part and may overlap one another.
        """
        starts = self.generator.integers(self.start, self.stop - self.context, size=sequences)
        return _windows(self.stream, starts, self.context)

    def restart(self, step: int) -> None:
        """Go on after `step` steps with windows that do not follow from those before."""
        self.generator = np.random.default_rng(np.random.SeedSequence([*self.seed, step]))

    def state_dict(self) -> dict:
        """Return the generator's state: nested dictionaries of strings and integers."""
        return self.generator.bit_generator.state

    def load_state_dict(self, state: dict) -> None:
        """Continue exactly where `state_dict` was called."""
        self.generator.bit_generator.state = state


class Prefetched:
    """The same batches as `batches` gives, each read by a thread while the one before is in use.

    What was read and not handed out counts for nothing: not in `state_dict`, and an error of
    reading is raised by the `next` that would have read it.
    """

    def __init__(self, batches: WorkerBatches):
        self.batches = batches
        self._thread = ThreadPoolExecutor(1)
        self._ahead: Future | None = None

    def next(self, sequences: int) -> tuple[torch.Tensor, torch.Tensor]:
        """As WorkerBatches has it."""
        if self._ahead is None or self._sequences != sequences:
            self._forget()
            self._read(sequences)
        ahead, self._ahead = self._ahead, None
        batch = ahead.result()
        self._read(sequences)
        return batch

    def restart(self, step: int) -> None:
        self._forget()
        self.batches.restart(step)

    def state_dict(self) -> dict:
        self._forget()
        return self.batches.state_dict()

    def load_state_dict(self, state: dict) -> None:
        self._forget()
        self.batches.load_state_dict(state)

    def _read(self, sequences: int) -> None:
        self._before, self._sequences = self.batches.state_dict(), sequences
        self._ahead = self._thread.submit(self.batches.next, sequences)

    def _forget(self) -> None:
        """Take back what was read ahead."""
        if self._ahead is not None:
            wait([self._ahead])
            self._ahead = None
            self.batches.load_state_dict(self._before)


class TestWindows:
    """The test set: len(windows) = tokens // context windows in a fixed order.

    They start every (len(stream) - 1) // len(windows) tokens, so they cover the whole stream
    evenly and never overlap, and depend neither on a seed nor on the number of workers. Raises
    ValueError if `tokens` is less than one window or more than the stream holds.
    """

    __test__ = False  # pytest: not a test case

    def __init__(self, stream: TokenStream, context: int, tokens: int):
        most = (len(stream) - 1) // context * context  # the last target is nobody's input
        if most == 0:
            raise ValueError(
                f"{len(stream)} test tokens are fewer than one window of {context + 1}: "
                f"use a context below {len(stream)}"
            )
        if not context <= tokens < most + context:
            raise ValueError(
                f"{tokens} test tokens wanted in windows of {context} from a test set of "
                f"{len(stream)}: use {context} to {most}"
            )
        self.stream = stream
        self.context = context
        self.count = tokens // context
        self.stride = (len(stream) - 1) // self.count

    def __len__(self) -> int:
        return self.count

    def batches(
        self, worker: int, workers: int, sequences: int, together: bool = False
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor, int]]:
        """Yield inputs, targets, int64 (at most `sequences`, context), and how many tokens count.

        The worker reads the windows worker, worker + workers, ... in this order; all workers
        together read every window once. A worker may have one window fewer than another, or none;
        but with `together`, for a model that they compute together, it yields as often as the
        others, at last the first window again, of which no token counts.
        """
        own = range(worker, self.count, workers)
        most = len(range(0, self.count, workers)) if together else len(own)
        for first in range(0, most, sequences):
            starts = [self.stride * window for window in own[first : first + sequences]]
            inputs, targets = _windows(self.stream, starts or [0], self.context)
            yield inputs, targets, targets.numel() if starts else 0


def _windows(
    stream: TokenStream, starts: Sequence[int] | np.ndarray, context: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return inputs and targets (len(starts), context) of the windows at `starts`."""
    windows = torch.from_numpy(np.stack([stream.read(int(start), context + 1) for start in starts]))
    return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()


def open_streams(
    train: str, test: str, train_shards: int, vocab_size: int, rebuild: str, root: Path | str
) -> tuple[TokenStream, TokenStream]:
    """Open the training and the test tokens of a data set.

    `train` and `test` are file names or glob patterns, relative to `root` or absolute. The first
    `train_shards` training files in sorted order are read, and all test files. Raises ShardError
    if there are fewer (`rebuild` is the command that makes them) or one of them is damaged,
    ValueError if `train_shards` is less than 1.
    """
    if train_shards < 1:
        raise ValueError(f"train_shards is {train_shards}: use at least 1")
    train_paths = _matching(train, train_shards, rebuild, root)[:train_shards]
    test_paths = _matching(test, 1, rebuild, root)
    return (
        TokenStream(train_paths, vocab_size, rebuild),
        TokenStream(test_paths, vocab_size, rebuild),
    )


def _matching(pattern: str, least: int, rebuild: str, root: Path | str) -> list[Path]:
    paths = sorted(Path(root, name) for name in glob.glob(pattern, root_dir=root))
    if len(paths) < least:
        problem = f"{len(paths)} matching files, expected {least}"
        raise ShardError(Path(root, pattern), problem, rebuild)
    return paths
