"""What tests of networks share: at their end, nothing is left."""

import os

import pytest
from nodes import namespaces, processes


@pytest.fixture
def nothing_left(tmp_path, monkeypatch):
    """Temporary files go to tmp_path/tmp; at the end there are none, and no namespaces."""
    directory = tmp_path / "tmp"
    directory.mkdir()
    monkeypatch.setenv("TMPDIR", str(directory))
    monkeypatch.setattr("tempfile.tempdir", None)
    yield
    assert not namespaces(os.getpid())
    assert not processes(f"ef21-{os.getpid()}-")
    assert not list(directory.iterdir())
    assert not processes(str(tmp_path))
