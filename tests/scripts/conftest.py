"""What tests of scripts share: forks, nothing left of networks, pictures that are not rendered."""

import os

import preloaded
import pytest
from nodes import namespaces, processes


@pytest.fixture
def forks(monkeypatch):
    """What this process starts of Python is a fork of one that has imported torch."""
    monkeypatch.setattr("subprocess.Popen", preloaded.popen)


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


@pytest.fixture
def drawn(monkeypatch):
    """The figures of `training.picture.panels`, by name; not rendered, which takes seconds."""
    figures = {}
    monkeypatch.setattr(
        "training.picture.save", lambda figure, stem: figures.update({stem.name: figure})
    )
    return figures
