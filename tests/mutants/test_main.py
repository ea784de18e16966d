"""What counts as noticed, with a stand-in for pytest: three files of tests, and one that hangs."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.mutants import __main__ as mutants
from tests.mutants.mutation import Mutation

NOTICES, PASSES, BROKEN, HANGS = "test_model.py", "test_train.py", "test_after.py", "test_readme.py"
CASES = {
    "by the second file": (f"{PASSES} {NOTICES}", "tests/test_model.py::test_it[a]", []),
    "by no file": (PASSES, None, []),
    "by a test that fails without it": (BROKEN, None, ["tests/test_after.py::test_it[a]"]),
    "by what hangs with it": (HANGS, "tests/test_readme.py hangs", []),
    "by a file that is no longer there": (f"test_gone.py {NOTICES}", "tests/test_model.py::", []),
}


@pytest.fixture
def copy(tmp_path, monkeypatch):
    """Of a small repository."""
    root = tmp_path / "root"
    (root / "tests").mkdir(parents=True)
    subprocess.run(["git", "init", "--quiet", root], check=True)
    (root / "model.py").write_text("BASE = 10_000\n")
    for name in (NOTICES, PASSES, BROKEN, HANGS):
        (root / "tests" / name).write_text("")
    (root / "ef21_muon").mkdir()
    (root / "ef21_muon" / "__init__.py").write_text("")
    monkeypatch.setattr(mutants, "ROOT", root)
    monkeypatch.setattr(mutants, "run_pytest", stand_in)
    monkeypatch.delitem(sys.modules, "ef21_muon", raising=False)  # of other tests
    return mutants.Copy(tmp_path / "copy", seconds=1)


def stand_in(arguments):
    """Of pytest."""
    test, has_fault = arguments[-1], "BASE = 1" not in Path("model.py").read_text()
    if "readme" in test and has_fault:
        subprocess.Popen(["sleep", "1000"], start_new_session=True)
        time.sleep(1000)
    if "after" in test or ("model" in test and has_fault):
        print(f"FAILED {test}::test_it[a] - why")
        return 1
    return 0


def fault(tests):
    return Mutation("a fault", "model.py", "BASE = 10_000", "BASE = 2", tests)


@pytest.mark.parametrize("case", CASES)
def test_a_fault_is_noticed(copy, case):
    tests, by, broken = CASES[case]
    record = mutants.tried(copy, fault(tests), suite=False)
    assert (record["noticed_by"] or "None").startswith(str(by))
    assert record.get("broken", []) == broken
    assert (copy.folder / "model.py").read_text() == "BASE = 10_000\n"


def test_all_tests_run_where_asked_for(copy, monkeypatch):
    monkeypatch.setattr(mutants, "SUITE", ["-n", "2", f"tests/{NOTICES}"])
    assert mutants.tried(copy, fault(PASSES), suite=True)["noticed_by"]


def test_nothing_goes_on_of_what_hangs(copy):
    with copy.changed(fault(HANGS)):
        assert copy.pytest(f"tests/{HANGS}").how == "hangs"
    mark = f"{mutants.MARK}={copy.folder}".encode()
    assert not any(mark in read(path) for path in Path("/proc").glob("[0-9]*/environ"))


def read(path):
    try:
        return path.read_bytes()
    except OSError:  # it has ended
        return b""


def test_another_start_goes_on(copy, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(mutants, "MUTATIONS", [fault(NOTICES), fault(PASSES)._replace(fault="b")])
    monkeypatch.setattr(sys, "argv", ["mutants", "--out", str(tmp_path)])
    for _ in range(2):
        assert mutants.main() == 1
        assert "1 of 2 faults are noticed" in capsys.readouterr().out
    records = [json.loads(line) for line in (tmp_path / "mutants.jsonl").read_text().splitlines()]
    assert [one["fault"] for one in records] == ["a fault", "b", "b"]
    rows = (tmp_path / "mutants.md").read_text().splitlines()[2:]
    assert rows[0].startswith("| b | `model.py` | **no test** | ") and len(rows) == 2
