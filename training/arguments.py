"""The command line of train.py."""

import argparse
import re
import shlex
from pathlib import Path

from omegaconf import DictConfig

from training.config import CONFIGS
from training.workers import RunError

MOST_SECONDS = 1_000_000


class Parser(argparse.ArgumentParser):
    """A parser whose errors are RunErrors."""

    def error(self, message: str):
        raise RunError(f"{message}: see {self.prog} --help")


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line of train.py. Raises RunError for one that cannot be read."""
    groups = "\n".join(
        f"  {folder.name:<12}{', '.join(sorted(file.stem for file in folder.glob('*.yaml')))}"
        for folder in sorted(path for path in CONFIGS.iterdir() if path.is_dir())
    )
    parser = Parser(
        prog="train.py",
        description="Train a GPT with EF21-Muon. Launch with torchrun, one process per worker.",
        epilog=(
            f"config groups (compressor@w2s= and compressor@s2w= choose for a direction):\n{groups}"
            "\n\nw2s= and s2w= take the spec of a compressor, such as w2s=rank:0.15:natural"
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="Hydra overrides")
    parser.add_argument(
        "-m", "--multirun", action="store_true", help="sweep over comma-separated values"
    )
    parser.add_argument(
        "--timeout",
        type=seconds,
        default=600,
        metavar="SECONDS",
        help="the longest wait for another worker (default %(default)s)",
    )
    parser.add_argument(
        "--cfg", action="store_true", help="print the resolved configuration of each job and stop"
    )
    return parser.parse_intermixed_args(arguments)


def pasted(key: str, path: Path) -> str:
    """The override KEY=PATH, quoted for a shell and for Hydra."""
    if re.fullmatch(r"[\w./+-]+", text := str(path)):
        return f"{key}={text}"
    # Hydra reads a backslash as itself, except before a quote.
    escaped = re.sub(r"(\\*)('|$)", lambda m: m[1] * 2 + m[2].replace("'", "\\'"), text)
    override = f"{key}='{escaped}'"
    return shlex.quote(override) if re.search(r'[$`"\\!]', override) else f'"{override}"'


def how_to_resume(config: DictConfig, directory: Path) -> str:
    """How to resume a run that was stopped, in words."""
    if not config.checkpoint.every:
        return "without a checkpoint, since checkpoint.every=0"
    if config.membership.name != "fixed":  # scripts/fleet.py chooses the directory itself
        return "the same command resumes it"
    return f"resume with resume=auto {pasted('directory', directory)}"


def seconds(text: str) -> float:
    """The value of --timeout."""
    number = float(text)
    if not 0 < number <= MOST_SECONDS:
        raise argparse.ArgumentTypeError(
            f"{text} s is not allowed: give a number above 0, at most {MOST_SECONDS}"
        )
    return number
