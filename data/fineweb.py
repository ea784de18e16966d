"""FineWeb-10B, already tokenised for GPT-2 (`python data/fineweb.py download --shards N`)."""

import argparse
import sys
from pathlib import Path

from huggingface_hub import hf_hub_download
from tqdm import tqdm

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data.shards import ShardError, open_shard

DIRECTORY = Path(__file__).resolve().parent / "fineweb10B"
REPOSITORY = "kjj0/fineweb10B-gpt2"
TRAIN_SHARDS = 103


def shard_paths(directory: Path, shards: int) -> tuple[list[Path], list[Path]]:
    """Return the paths of the first `shards` training shards, and of the test shard in a list."""
    train = [directory / f"fineweb_train_{index:06d}.bin" for index in range(1, shards + 1)]
    return train, [directory / "fineweb_val_000000.bin"]


def download(directory: Path, shards: int) -> None:
    """Fetch the test shard and the first `shards` training shards; keep those already valid.

    Raises ShardError if a fetched file is not a valid shard, OSError if the hub cannot be reached.
    """
    rebuild = f"python data/fineweb.py download --shards {shards}"
    train, test = shard_paths(directory, shards)
    for path in tqdm(test + train, unit="shard"):
        if path.exists():
            try:
                open_shard(path, rebuild)
                continue
            except ShardError as error:
                tqdm.write(f"fetching again: {error}", file=sys.stderr)
        hf_hub_download(
            REPOSITORY,
            path.name,
            repo_type="dataset",
            local_dir=directory,
            force_download=path.exists(),
        )
        open_shard(path, rebuild)


def main() -> None:
    parser = argparse.ArgumentParser(description="Fetch the FineWeb-10B shards.")
    command = parser.add_subparsers(required=True).add_parser("download")
    command.add_argument(
        "--shards",
        type=int,
        default=TRAIN_SHARDS,
        help=f"training shards of 100 million tokens (200 MB) each, 1 to {TRAIN_SHARDS} (default)",
    )
    arguments = parser.parse_args()
    if not 1 <= arguments.shards <= TRAIN_SHARDS:
        parser.error(f"--shards is {arguments.shards}: use 1 to {TRAIN_SHARDS}")
    try:
        download(DIRECTORY, arguments.shards)
    except (ShardError, OSError) as error:
        sys.exit(f"error: {str(error).splitlines()[0]}")
    print(f"{DIRECTORY}: 1 test shard and {arguments.shards} training shards")


if __name__ == "__main__":
    main()
