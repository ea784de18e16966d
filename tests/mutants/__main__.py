"""Which tests notice which faults: `python -m tests.mutants`, or `make mutants`.

Every fault is put into a copy of the repository, and the tests that should notice it run there, one
file after the other, until one fails. A test counts only if it passes in the copy without the
fault. Tests run in forks of this process, which has imported what takes long. The records are JSON
lines: another start resumes with what is left, and repeats what no test has noticed.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from importlib import import_module
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from typing import IO, NamedTuple

import pytest

from tests.mutants.mutation import Mutation
from tests.mutants.mutations import MUTATIONS

ROOT = Path(__file__).resolve().parents[2]
LINKS = (".venv", "data/shakespeare_bytes")  # what git ignores and tests need
OPTIONS = ["-x", "-q", "--tb=no", "-p", "no:cacheprovider"]
FORK = get_context("fork")
SLOW_TO_IMPORT = ("torch._dynamo", "torch.distributed.fsdp", "hydra", "hypothesis")
SUITE = ["-n", "2", "--dist", "loadfile", "--ignore=tests/mutants", "tests"]
MARK = "COPY_WITH_A_FAULT"  # the variable by which processes of a copy are known
PASSED, FAILED, NO_TESTS = 0, 1, 5  # pytest's statuses


class Failure(NamedTuple):
    """What failed, a test or a file of tests, and how if pytest did not say it."""

    test: str
    how: str = ""


class Copy:
    """A copy of the working tree, in which tests run.

    Args:
        folder: where it is.
        seconds: how long a file of tests may take.
    """

    def __init__(self, folder: Path, seconds: float):
        self.folder, self.seconds = folder, seconds
        listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        names = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True)
        for name in filter(None, names.stdout.split("\0")):
            if (ROOT / name).is_file():
                self.write(name, (ROOT / name).read_bytes())
        for name in LINKS:
            if (ROOT / name).exists():
                (folder / name).symlink_to((ROOT / name).resolve())
        of_tests = folder.with_name(f"{folder.name}-temporary")
        of_tests.mkdir()
        self.environment = {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
        self.environment |= {"TMPDIR": str(of_tests), MARK: str(folder)}
        self._passes: dict[str, bool] = {}  # tests without a fault

    def write(self, name: str, content: bytes) -> None:
        """Write a file. What Python has compiled of it is removed: it goes by size and second."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        for compiled in path.parent.glob(f"__pycache__/{path.stem}.*.pyc"):
            compiled.unlink()

    @contextmanager
    def changed(self, mutation: Mutation) -> Iterator[None]:
        """Within it the copy has the fault."""
        before = (self.folder / mutation.file).read_bytes()
        self.write(mutation.file, mutation.applied(before.decode()).encode())
        try:
            yield
        finally:
            self.write(mutation.file, before)

    def pytest(self, *arguments: str) -> Failure | None:
        """Run tests, whose file is the last of the arguments, until one fails."""
        with tempfile.TemporaryFile("w+") as output:
            process = FORK.Process(target=self._run_tests, args=(arguments, output))
            process.start()
            process.join(self.seconds)
            hangs = process.is_alive()
            process.kill()
            process.join()
            self._end_processes()
            output.seek(0)
            lines = output.read().splitlines()
        if process.exitcode in (PASSED, NO_TESTS):
            return None
        if hangs:
            return Failure(arguments[-1], "hangs")
        failed = [line.split(" ", 1)[1] for line in lines if line.startswith(("FAILED ", "ERROR "))]
        if not failed and process.exitcode == FAILED:
            raise RuntimeError("\n".join(lines))  # not of tests
        if not failed:
            return Failure(arguments[-1], f"ends with status {process.exitcode}")
        return Failure(failed[0].partition(" - ")[0])

    def _run_tests(self, arguments: tuple[str, ...], output: IO) -> None:
        """Become a process of the copy, and end with pytest's status."""
        sys.stdout = sys.stderr = output
        for number in (1, 2):
            os.dup2(output.fileno(), number)
        os.chdir(self.folder)
        os.environ |= self.environment
        tempfile.tempdir = None  # which TMPDIR names from now on
        sys.path[:] = [
            str(self.folder),
            *(path for path in sys.path if path not in ("", str(ROOT))),
        ]
        for name in [name for name in sys.modules if name.partition(".")[0] == "tests"]:
            del sys.modules[name]
        require_own_modules(self.folder)
        status = run_pytest([*OPTIONS, *arguments])
        output.flush()
        sys.exit(status)

    def passes(self, test: str) -> bool:
        """Whether tests pass in the copy as it is, which has no fault then."""
        if test not in self._passes:
            self._passes[test] = self.pytest(test) is None
        return self._passes[test]

    def _end_processes(self) -> None:
        """Kill what tests have left, also in sessions of its own."""
        mark = f"{MARK}={self.folder}".encode()
        for path in Path("/proc").glob("[0-9]*/environ"):
            with suppress(OSError):
                if mark in path.read_bytes().split(b"\0"):
                    os.kill(int(path.parent.name), signal.SIGKILL)


def run_pytest(arguments: list[str]) -> int:
    """Run pytest in this process; return its status."""
    return int(pytest.main(arguments))


def require_own_modules(folder: Path) -> None:
    """Raise RuntimeError if this process, or one that it starts, imports what is elsewhere."""
    code = "from importlib.util import find_spec; print(find_spec('ef21_muon').origin)"
    command = [sys.executable, "-c", code]
    there = subprocess.run(command, cwd="/", capture_output=True, text=True, check=True).stdout
    own, found = f"{folder}/ef21_muon/__init__.py", {find_spec("ef21_muon").origin, there.strip()}
    if found != {own}:
        raise RuntimeError(f"faults would not be seen: {found} are imported, not {own}")


def tried(copy: Copy, mutation: Mutation, suite: bool) -> dict:
    """The record of a fault: which test has noticed it, and how long that took.

    Args:
        copy: where it is tried.
        mutation: the fault.
        suite: whether all tests run where those that should notice it do not.
    """
    start, noticed_by, broken = time.monotonic(), None, []
    files = [f"tests/{name}" for name in mutation.tests.split()]
    files = [[name] for name in files if (copy.folder / name).is_file()]
    for arguments in [*files, *([SUITE] if suite else [])]:
        with copy.changed(mutation):
            failure = copy.pytest(*arguments)
        if failure and copy.passes(failure.test):
            noticed_by = " ".join(filter(None, failure))
            break
        broken += [failure.test] if failure else []
    seconds = round(time.monotonic() - start, 1)
    facts = {"fault": mutation.fault, "file": mutation.file, "noticed_by": noticed_by}
    return facts | {"seconds": seconds} | ({"broken": broken} if broken else {})


def make_copy(folder: Path, seconds: float) -> None:
    """Make the copy in which this process of a pool works, and import what tests do."""
    global own_copy
    for name in SLOW_TO_IMPORT:
        import_module(name)
    own_copy = Copy(folder.resolve() / str(os.getpid()), seconds)


def tried_here(mutation: Mutation, suite: bool) -> dict:
    """The record of a fault, from this process's own copy."""
    return tried(own_copy, mutation, suite)


def read(path: Path) -> dict[str, dict]:
    """The last record of every fault."""
    lines = path.read_text().splitlines() if path.exists() else []
    return {record["fault"]: record for record in map(json.loads, lines)}


def table(records: dict[str, dict]) -> str:
    """The records as a Markdown table, those of faults that no test has noticed first."""
    rows = ["| fault | in | noticed by | s |", "| --- | --- | --- | ---: |"]
    for record in sorted(records.values(), key=lambda one: one["noticed_by"] is not None):
        by = f"`{record['noticed_by']}`" if record["noticed_by"] else "**no test**"
        by = by.replace("tests/", "", 1).replace("|", "\\|")
        rows.append(f"| {record['fault']} | `{record['file']}` | {by} | {record['seconds']:.0f} |")
    return "\n".join(rows) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", default="", metavar="TEXT", help="faults or files with this text")
    parser.add_argument("--suite", action="store_true", help="all tests, for what is not noticed")
    parser.add_argument("--processes", type=int, default=1, help="copies to work in at a time")
    parser.add_argument("--seconds", type=float, default=600, help="that a file of tests may take")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "mutants", metavar="FOLDER")
    arguments = parser.parse_args()
    path = arguments.out / "mutants.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    noticed = {fault for fault, record in read(path).items() if record["noticed_by"]}
    chosen = [one for one in MUTATIONS if arguments.only in f"{one.fault} {one.file}"]
    left = [one for one in chosen if one.fault not in noticed]

    with (
        tempfile.TemporaryDirectory(prefix="mutants-") as folder,
        ProcessPoolExecutor(
            arguments.processes, FORK, make_copy, (Path(folder), arguments.seconds)
        ) as pool,
        path.open("a") as file,
    ):
        records = [pool.submit(tried_here, one, arguments.suite) for one in left]
        for record in map(Future.result, as_completed(records)):
            print(json.dumps(record), file=file, flush=True)
            print(f"{record['noticed_by'] or 'NO TEST'}: {record['fault']}", flush=True)
    records = {one.fault: read(path)[one.fault] for one in chosen}
    path.with_suffix(".md").write_text(table(records))
    survived = sum(record["noticed_by"] is None for record in records.values())
    print(f"{len(records) - survived} of {len(records)} faults are noticed; see {path.parent}")
    return survived > 0


if __name__ == "__main__":
    sys.exit(main())
