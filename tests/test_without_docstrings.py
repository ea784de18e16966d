"""PYTHONOPTIMIZE=2 takes docstrings away: every program runs without its own."""

import re
import sys
from pathlib import Path

import pytest
from run import ROOT

PROGRAMS = [
    path
    for pattern in ("*.py", "data/*.py", "scripts/**/*.py")
    for path in sorted(ROOT.glob(pattern))
    if '__name__ == "__main__"' in (text := path.read_text()) and re.search("[Pp]arse[r_]", text)
]


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_program_says_how_it_is_called_without_docstrings(path: Path, monkeypatch, capsys):
    code = compile(path.read_text(), str(path), "exec", optimize=2)
    monkeypatch.setattr(sys, "argv", [str(path), "--help"])
    monkeypatch.setattr(sys, "path", list(sys.path))
    names = {"__name__": "__main__", "__file__": str(path), "__package__": None}
    with pytest.raises(SystemExit) as end:
        exec(code, names)
    assert end.value.code == 0 and capsys.readouterr().out.startswith("usage: ")
