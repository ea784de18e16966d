"""The records of a run's log, metrics.jsonl: reading them, and their traffic in words."""

import json
from dataclasses import dataclass
from pathlib import Path

from training.renamed import modern_run

LOG_NAME = "metrics.jsonl"
SCHEMA = 1
NEEDED_FIELDS = {
    "run": ("label", "parameters"),
    "train": (),
    "eval": ("tokens", "test_loss", "w2s_bytes"),
    "end": (),
    "diagnostics": (),
    "elastic": (),
    "membership": ("workers",),
}
BYTES_PER_PARAMETER = 4


def both_ways(sent: int) -> int:
    """The uncompressed traffic of a worker, in bytes: it sends `sent`, and receives as many."""
    return 2 * sent


def megabytes(size: int, exactly: bool = False) -> str:
    """A number of bytes in MB, which are 10^6 bytes; exactly: with the number of bytes."""
    return f"{size / 1e6:,.1f} MB" + (f" ({size:,} bytes)" if exactly else "")


def ratio(record: dict, uncompressed: int) -> str:
    """How many times less than `uncompressed` bytes a worker has sent and received together.

    Empty if it has sent and received nothing.
    """
    moved = record["w2s_bytes"] + record["received_bytes"]
    return f"{uncompressed / moved:,.1f}x less" if moved else ""


def traffic(record: dict, parameters: int) -> str:
    """The traffic of a worker up to a record, in words.

    It is compared with float32 both ways: a worker that sends a gradient of 4 bytes per parameter
    and receives a model of the same size in every step.
    """
    sent, received = (megabytes(record[key]) for key in ("w2s_bytes", "received_bytes"))
    less = ratio(record, both_ways(record["step"] * BYTES_PER_PARAMETER * parameters))
    compared = f", {less} than uncompressed (both ways)" if less else ""
    return f"sent {sent}, received {received} per worker{compared}"


@dataclass(frozen=True)
class Log:
    """The records of one metrics.jsonl; `end` is None while the run is not finished."""

    run: dict
    train: list[dict]
    evals: list[dict]
    end: dict | None


def read_log(path: Path) -> Log:
    """Read and check the log at `path`.

    A last line that ends before its newline and is no JSON is a record still being written, or cut
    off when the run was killed, and is left out. Raises ValueError, naming the file and the line,
    for a missing file, a broken line, a missing field, an unknown schema, and a log without evals.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} does not exist; give a directory that holds a {LOG_NAME}")
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    records: dict[str, list[dict]] = {kind: [] for kind in NEEDED_FIELDS}
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines):
                break
            fault = f"not JSON ({error.msg}, column {error.colno})"
        else:
            fault = _fault(record, first=number == 1)
        if fault:
            raise ValueError(f"{path}:{number}: {fault}; mend the line or leave the run out")
        records[record["record"]].append(record)
    if not records["eval"]:
        raise ValueError(f"{path} has no eval record; draw it after the run's first evaluation")
    return Log(
        run=modern_run(records["run"][0]),
        train=records["train"],
        evals=records["eval"],
        end=records["end"][-1] if records["end"] else None,
    )


def _fault(record: object, first: bool) -> str | None:
    kind = record.get("record") if isinstance(record, dict) else None
    if kind not in NEEDED_FIELDS:
        return f"record is {kind!r}, allowed are {', '.join(NEEDED_FIELDS)}"
    if first != (kind == "run"):
        return f"record is {kind!r}, but line 1 and no other is the run record"
    if first and record.get("schema") != SCHEMA:
        return f"schema is {record.get('schema')!r}, this program reads {SCHEMA}"
    missing = [field for field in NEEDED_FIELDS[kind] if field not in record]
    return f"the {kind} record lacks {', '.join(missing)}" if missing else None


def find_runs(directory: Path) -> list[Path]:
    """The run directories at or below `directory`, sorted. Raises ValueError when there is none."""
    directory = Path(directory)
    runs = sorted(path.parent for path in directory.rglob(LOG_NAME))
    if not runs:
        raise ValueError(f"no {LOG_NAME} in or below {directory}; give a run or study directory")
    return runs
