"""Rebuild a wandb run from a run's log: `python scripts/to_wandb.py RUN_DIR [--mode offline]`."""

import argparse
import sys
from pathlib import Path

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from training.mirror import init
from training.records import LOG_NAME, Log, read_log
from training.workers import RunError, one_line


def history(log: Log) -> list[tuple[int, dict]]:
    """What train.py mirrors to wandb: for every step logged, the numbers of its records."""
    of_steps: dict[int, dict] = {}
    for record in (*log.train, *log.evals):
        numbers = {k: v for k, v in record.items() if k not in ("record", "step")}
        of_steps.setdefault(record["step"], {}).update(numbers)
    return sorted(of_steps.items())


def upload(log: Log, options: argparse.Namespace) -> None:
    try:
        run = init(
            project=options.project,
            mode=options.mode,
            name=log.run["label"],
            dir=options.run,
            config=log.run["config"],
            settings={"console": "off"},
        )
        for step, numbers in history(log):
            run.log(numbers, step=step)
        run.finish()
    except Exception as error:  # of any kind that wandb, or what it uses, may raise
        raise RunError(
            f"wandb did not take the run ({one_line(error)}): start again when it answers, or "
            "give --mode offline"
        ) from error


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("run", type=Path, help="a run directory")
    parser.add_argument("--project", default="ef21-muon", help="(default %(default)s)")
    parser.add_argument("--mode", choices=("online", "offline"), default="online")
    options = parser.parse_args()
    try:
        upload(read_log(options.run / LOG_NAME), options)
    except (ValueError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
