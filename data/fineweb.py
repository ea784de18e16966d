"""FineWeb-10B as shards of GPT-2 tokens: fetched ready-made, checked, or made from the text.

    python data/fineweb.py download [--shards N]    the published shards, 200 MB each
    python data/fineweb.py verify                   compare the files with manifest.json
    python data/fineweb.py tokenize                 the same from the text (27 GB)

With --dataset finewebedu10B the first two are of FineWeb-Edu, which has 99 training shards. All
three can be stopped and started again. `--help` after a command lists its options.
"""

import argparse
import os
import re
import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import httpx2
from huggingface_hub import HfFileMetadata, constants, get_hf_file_metadata, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_stream_backoff
from tqdm import tqdm

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data.bars import bar
from data.files import Claim
from data.manifest import Manifest, sha256, shard_paths
from data.shards import ShardError, open_shard


@dataclass(frozen=True)
class Published:
    """A data set of the hub in shards: one of the test, and training shards of 10^8 tokens.

    Files are named by the prefix.
    """

    repository: str
    prefix: str
    train_shards: int


# By the names of their folders beside this file. Names and numbers are those in the scripts of
# microsoft/dion (data/cached_fineweb10B.py and data/cached_finewebedu10B.py).
DATASETS = {
    "fineweb10B": Published("kjj0/fineweb10B-gpt2", "fineweb", 103),
    "finewebedu10B": Published("kjj0/finewebedu10B-gpt2", "finewebedu", 99),
}
FINEWEB = DATASETS["fineweb10B"]
ATTEMPTS = 5  # of a shard whose transfer breaks or whose content is wrong


def download(
    directory: Path, shards: int, rebuild: str, published: Published = FINEWEB
) -> Manifest:
    """Fetch the test shard and the first `shards` training shards; keep those already right.

    A shard that the manifest lists is checked against it, without the network; the others against
    the hub. `rebuild` is the command that does the same again. Raises RuntimeError if a shard
    cannot be fetched, ShardError if the hub's file is no shard, ValueError if `directory` holds
    shards of another source.
    """
    directory.mkdir(parents=True, exist_ok=True)
    source = {"repository": published.repository}
    manifest = Manifest.start(directory, source, rebuild, published.prefix)
    manifest.train_shards = max(shards, len(manifest.shards) - 1)
    manifest.save()
    train, test = shard_paths(directory, shards, published.prefix)
    for path in bar(test + train, unit="shard"):
        if path.name in manifest.shards:
            try:
                manifest.check(path.name)
                continue
            except ShardError as error:
                tqdm.write(f"fetching again: {error}", file=sys.stderr)
        try:
            revision = fetch(path, published.repository, rebuild)
        except HfHubHTTPError as error:
            answer = f"the hub answers HTTP {error.response.status_code}"
            raise _failure(path, published.repository, answer, rebuild) from error
        except httpx2.TransportError as error:
            problem = f"no connection ({error})"
            raise _failure(path, published.repository, problem, rebuild) from error
        manifest.record(path.name, revision=revision)
    return manifest


def fetch(path: Path, repository: str, rebuild: str) -> str:
    """Fetch one shard from a data set of the hub unless it is there; return the hub's revision.

    The bytes go to a file beside it with `.partial` added, where a later call goes on. It gets its
    name when length, SHA-256 and header are right. Raises RuntimeError if they still are not after
    ATTEMPTS attempts, ShardError if the hub's file is no shard, HfHubHTTPError if the hub refuses
    (429 and 5xx only after the tries and waits, Retry-After included, of its own client).
    """
    url = hf_hub_url(repository, path.name, repo_type="dataset")
    expected = get_hf_file_metadata(url, retry_on_errors=True)
    if expected.size is None or not re.fullmatch("[0-9a-f]{64}", expected.etag or ""):
        raise _failure(path, repository, "the hub gives no length or no SHA-256", rebuild)
    if path.exists():
        problem = _difference(path, expected)
        if problem is None:
            return expected.commit_hash
        tqdm.write(f"fetching again: {path}: {problem}", file=sys.stderr)

    url = hf_hub_url(repository, path.name, repo_type="dataset", revision=expected.commit_hash)
    partial = path.with_name(path.name + ".partial")
    for attempt in range(1, ATTEMPTS + 1):
        try:
            _transfer(url, partial, expected.size)
            problem = _difference(partial, expected)
        except httpx2.TransportError as error:
            problem = f"the transfer broke ({error})"
        if problem is None:
            break
        if _size(partial) >= expected.size:  # nothing to go on from
            partial.unlink()
        tqdm.write(f"{path.name}, attempt {attempt} of {ATTEMPTS}: {problem}", file=sys.stderr)
        if attempt < ATTEMPTS:
            time.sleep(2 ** (attempt - 1))
    else:
        raise _failure(path, repository, f"{problem}, after {ATTEMPTS} attempts", rebuild)
    try:
        open_shard(partial, rebuild)
    except ShardError:
        partial.unlink()
        raise
    partial.replace(path)
    return expected.commit_hash


def _transfer(url: str, partial: Path, size: int) -> None:
    """Append to `partial` what it lacks of `size` bytes, as far as the server gives it."""
    start = _size(partial)
    if start >= size:
        return
    headers = {**build_hf_headers(), "Accept-Encoding": "identity", "Range": f"bytes={start}-"}
    timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
    with http_stream_backoff(
        "GET", url, headers=headers, timeout=timeout, retry_on_exceptions=()
    ) as response:
        if response.status_code == 416:  # the server's file ends at or before `start`
            return
        hf_raise_for_status(response)
        resumed = response.status_code == 206
        progress = bar(
            total=size,
            initial=start if resumed else 0,
            desc=partial.stem,
            unit="B",
            unit_scale=True,
            leave=False,
        )
        with progress, partial.open("ab" if resumed else "wb") as file:
            for chunk in response.iter_bytes():
                file.write(chunk)
                progress.update(len(chunk))
            file.flush()
            os.fsync(file.fileno())


def _difference(path: Path, expected: HfFileMetadata) -> str | None:
    size = _size(path)
    if size != expected.size:
        return f"{size} bytes, expected {expected.size}"
    digest = sha256(path)
    return None if digest == expected.etag else f"SHA-256 {digest}, expected {expected.etag}"


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _failure(path: Path, repository: str, problem: str, rebuild: str) -> RuntimeError:
    return RuntimeError(
        f"{path.name} of {repository}: {problem}; to go on from here, run again: {rebuild}"
    )


def verify(directory: Path) -> Manifest:
    """Check every file against the manifest: present, header, length, tokens, SHA-256.

    Prints each problem. Raises ShardError if there is no manifest, and at the end if there was a
    problem or the set is not complete.
    """
    manifest = Manifest.read(directory)
    names = manifest.names()
    problems = 0
    for name in bar(names, unit="shard"):
        try:
            manifest.check(name)
        except ShardError as error:
            problems += 1
            tqdm.write(f"error: {error}", file=sys.stderr)
    if manifest.train_shards is None:
        raise ShardError(directory, "not all shards are made yet", manifest.rebuild)
    if problems:
        problem = f"{problems} of {len(names)} shards missing or wrong"
        raise ShardError(directory, problem, manifest.rebuild)
    return manifest


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    fetching = commands.add_parser("download", help="fetch the published shards")
    fetching.add_argument(
        "--shards",
        type=int,
        help="training shards of 100 million tokens (200 MB) each; all by default, 103 or 99",
    )
    checking = commands.add_parser("verify", help="compare the files with manifest.json")
    making = commands.add_parser("tokenize", help="make the shards from the text")
    making.add_argument(
        "--parquet",
        nargs="+",
        type=Path,
        metavar="FILE",
        help="read the column `text` of these files, in this order, instead of the hub's data set",
    )
    making.add_argument(
        "--processes", type=int, default=os.cpu_count(), help="default: the processors, %(default)s"
    )
    making.add_argument(
        "--shard-tokens", type=int, default=10**8, help="tokens of a shard, default %(default)s"
    )
    for command in (fetching, checking):
        command.add_argument("--dataset", choices=DATASETS, help="default: fineweb10B")
    for command in (fetching, checking, making):
        command.set_defaults(dataset="fineweb10B")
        command.add_argument(
            "--out", type=Path, help="folder of the shards, by default data/fineweb10B or the like"
        )
    arguments = parser.parse_args()
    arguments.out = arguments.out or Path(__file__).resolve().parent / arguments.dataset
    most_shards = DATASETS[arguments.dataset].train_shards
    for name, most in (("shards", most_shards), ("processes", 1024), ("shard_tokens", 2**31 - 1)):
        value = getattr(arguments, name, None)
        if value is not None and not 1 <= value <= most:
            parser.error(f"--{name.replace('_', '-')} is {value}: use 1 to {most}")
    try:
        manifest = _run(arguments)
    except (ShardError, RuntimeError, OSError, ValueError, httpx2.HTTPError) as error:
        sys.exit(f"error: {next(filter(None, str(error).splitlines()), type(error).__name__)}")
    tokens = sum(shard["tokens"] for shard in manifest.shards.values())
    shards = f"1 test shard and {manifest.train_shards} training shards"
    print(f"{arguments.out}: {shards}, {tokens:,} tokens")


def _run(arguments: argparse.Namespace) -> Manifest:
    directory = arguments.out
    rebuild = shlex.join(["python", "data/fineweb.py", *sys.argv[1:]])
    if arguments.command == "verify":
        return verify(directory)
    with Claim(directory):
        if arguments.command == "download":
            published = DATASETS[arguments.dataset]
            shards = arguments.shards or published.train_shards
            return download(directory, shards, rebuild, published)

        from data.tokenize_fineweb import hub_files, local_files, tokenize

        files = local_files(arguments.parquet) if arguments.parquet else hub_files(directory)
        return tokenize(directory, files, arguments.shard_tokens, arguments.processes, rebuild)


if __name__ == "__main__":
    main()
