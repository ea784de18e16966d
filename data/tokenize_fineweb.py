"""Shards of GPT-2 tokens from the text of FineWeb (`python data/fineweb.py tokenize`).

A document is the end-of-text token followed by the document's own tokens, and a shard ends where
it is full, be it inside a document, as in the published shards (modded-nanogpt, llm.c).
"""

import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from huggingface_hub import HfApi
from tqdm import tqdm

from data.bars import bar
from data.gpt2 import gpt2
from data.manifest import FILE_NAME, Manifest
from data.shards import ShardError, write_shard

REPOSITORY = "HuggingFaceFW/fineweb"
FOLDER = "sample/10BT"
BATCH = 64  # documents that a process encodes at a time
BATCHES_AHEAD = 4  # per process, so that memory stays bounded


@dataclass(frozen=True)
class ParquetFiles:
    """Parquet files with a column `text`: how to open them, and what tells them from others."""

    urls: list[str]
    identity: dict


def local_files(paths: Sequence[Path]) -> ParquetFiles:
    """Raises OSError if one of the files is missing."""
    sizes = [[path.name, path.stat().st_size] for path in paths]
    return ParquetFiles([str(path.resolve()) for path in paths], {"files": sizes})


def hub_files(directory: Path) -> ParquetFiles:
    """Return the files of the data set on the hub.

    They have the revision that the manifest in `directory` names, if there is one, otherwise the
    newest. Raises httpx2.HTTPError if the hub cannot be asked.
    """
    started = (directory / FILE_NAME).is_file()
    revision = Manifest.read(directory).source.get("revision") if started else None
    api = HfApi()
    revision = api.dataset_info(REPOSITORY, revision=revision).sha
    tree = api.list_repo_tree(REPOSITORY, FOLDER, repo_type="dataset", revision=revision)
    sizes = sorted([file.path, file.size] for file in tree if file.path.endswith(".parquet"))
    return ParquetFiles(
        [f"hf://datasets/{REPOSITORY}@{revision}/{path}" for path, _ in sizes],
        {"repository": REPOSITORY, "revision": revision, "files": sizes},
    )


def tokenize(
    directory: Path, files: ParquetFiles, shard_tokens: int, processes: int, rebuild: str
) -> Manifest:
    """Write all tokens of `files` as shards of `shard_tokens` tokens; the last may be shorter.

    The first is the test shard. The files do not depend on `processes`. A run that was stopped
    goes on after the last shard that is right: the manifest keeps, as `next` of each shard, where
    the text of the following one begins. Raises ValueError if `directory` holds other shards or
    the text fills no training shard, RuntimeError if a process is lost or there is no vocabulary.
    """
    directory.mkdir(parents=True, exist_ok=True)
    if not (directory / FILE_NAME).is_file() and any(directory.glob("fineweb_*.bin")):
        raise ValueError(
            f"{directory} holds shards without {FILE_NAME}: give another folder with --out, "
            "or remove them"
        )
    source = {**files.identity, "shard_tokens": shard_tokens}
    manifest = Manifest.start(directory, source, rebuild)
    place = _keep_good_shards(manifest)
    manifest.save()
    if manifest.train_shards is not None:
        return manifest

    shard = np.empty(shard_tokens, dtype=np.uint16)
    filled = 0
    skip = place["tokens"]
    done = sum(entry["tokens"] for entry in manifest.shards.values())
    with bar(initial=done, unit="token", unit_scale=True) as progress:
        for start, tokens in _encoded(files.urls, place, processes):
            used = min(skip, len(tokens))
            skip -= used
            while used < len(tokens):
                count = min(len(tokens) - used, shard_tokens - filled)
                shard[filled : filled + count] = tokens[used : used + count]
                used += count
                filled += count
                progress.update(count)
                if filled == shard_tokens:
                    _finish(manifest, shard, {**start, "tokens": used})
                    filled = 0
    if filled + shard_tokens * len(manifest.shards) <= shard_tokens:
        raise ValueError(
            f"{filled + shard_tokens * len(manifest.shards)} tokens fill the test shard alone: "
            "use fewer --shard-tokens"
        )
    if filled:
        _finish(manifest, shard[:filled], {"file": len(files.urls), "row": 0, "tokens": 0})
    manifest.train_shards = len(manifest.shards) - 1
    manifest.save()
    return manifest


def _keep_good_shards(manifest: Manifest) -> dict:
    """Forget the first shard that is not right and all after it; return where to go on.

    A place is a file, a row in it and how many tokens from there on are in earlier shards.
    """
    place = {"file": 0, "row": 0, "tokens": 0}
    names = list(manifest.shards)
    for index, name in enumerate(names):
        try:
            manifest.check(name)
        except ShardError as error:
            tqdm.write(f"going on from here: {error}", file=sys.stderr)
            manifest.train_shards = None
            for later in names[index:]:
                del manifest.shards[later]
            break
        place = manifest.shards[name]["next"]
    return place


def _finish(manifest: Manifest, tokens: np.ndarray, place: dict) -> None:
    index = len(manifest.shards)
    name = f"fineweb_{'train' if index else 'val'}_{index:06d}.bin"
    write_shard(manifest.directory / name, tokens)
    manifest.record(name, next=place)


def _encoded(urls: Sequence[str], place: dict, processes: int) -> Iterator[tuple[dict, np.ndarray]]:
    """Yield the first row and the tokens, uint16, of consecutive batches of documents."""
    gpt2()  # fetches the vocabulary before several processes want it
    context = multiprocessing.get_context("spawn")
    pending = deque()
    with ProcessPoolExecutor(processes, context, initializer=_start_worker) as pool:
        for start, texts in _batches(urls, place):
            pending.append((start, pool.submit(_encode, texts)))
            if len(pending) > BATCHES_AHEAD * processes:
                start, tokens = pending.popleft()
                yield start, tokens.result()
        for start, tokens in pending:
            yield start, tokens.result()


def _batches(urls: Sequence[str], place: dict) -> Iterator[tuple[dict, list[str]]]:
    """Yield the first row and the texts of consecutive batches, from `place` on."""
    import datasets  # takes seconds, and the processes that encode do not need it

    row = place["row"]
    for index in range(place["file"], len(urls)):
        rows = datasets.load_dataset(
            "parquet",
            data_files=[urls[index]],
            split="train",
            streaming=True,
            columns=["text"],
            batch_size=BATCH,
        )
        for table in rows.skip(row).with_format("arrow").iter(BATCH):
            texts = table["text"].to_pylist()
            if None in texts:
                raise ValueError(
                    f"{urls[index]}: row {row + texts.index(None)} has no text: give files in "
                    "which every row has one"
                )
            yield {"file": index, "row": row}, texts
            row += len(table)
        row = 0


def _encode(texts: list[str]) -> np.ndarray:
    encoding = gpt2()
    tokens = []
    for text in texts:
        tokens.append(encoding.eot_token)
        tokens.extend(encoding.encode_ordinary(text))
    return np.array(tokens, dtype=np.uint16)


def _start_worker() -> None:
    """Leave with the main process, even where it is killed, and leave Ctrl-C to it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def leave_with_parent() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=leave_with_parent, daemon=True).start()
