"""Nodes that differ, as two ranks with a folder of their own each: a line before the training."""

import json
import re
import shutil

import numpy as np
import pytest
from run import torchrun

from data.loader import SAMPLE_TOKENS, SAMPLES, TokenStream
from data.shards import write_shard

MINE = "from ef21_muon.compressors import TopK\n\n\nclass Mine(TopK):\n    pass\n"


@pytest.fixture(scope="module")
def folder(small, tmp_path_factory):
    """Where both ranks wrote what they were answered."""
    folder = tmp_path_factory.mktemp("nodes").resolve()
    train, test = (option.partition("=")[2] for option in small[-2:])
    for node in range(2):
        (own := folder / f"node{node}").mkdir()
        tokens = np.fromfile(train, dtype="<u2")[512:]
        tokens[5000] = node  # of as many
        write_shard(own / "train.bin", tokens)
        shutil.copy(test, own / "test.bin")
        (own / "both").mkdir()
        (own / "mine.py").write_text(MINE + "# or so\n" * node)
        (own / "within.py").write_text("from helper import Mine as Mine\n")
        (own / "helper.py").write_text(MINE + "# or so\n" * node)
        (own / f"only{node}.py").write_text(MINE)
        write_shard(own / f"only{node}.bin", tokens)
    with (folder / "node1/test.bin").open("r+b") as file:  # and a shorter one
        file.truncate(1024 + 2 * 1900)
        file.seek(8)
        file.write(np.int32(1900).tobytes())
    torchrun("apart.py", folder, *small, "steps=2", ranks=2)
    return folder


NOT_SHARED = r"rank 1 on [\w.-]+ does not share the run directory FOLDER/node0/{} of rank 0 on "
REMEDY = "): give one with directory= or runs= that all nodes share and may write$"
SAME_INPUTS = ": use the same data and code on all nodes$"
SAME_CODE = ": use the same code and the same torch on all nodes$"
DIGEST = r"SHA-256 \w{16}"
ON = r" on rank {} \([\w.-]+\)"
BOTH = f"{DIGEST}{ON.format(1)}, {DIGEST}{ON.format(0)}"


def tokens(theirs: int, ours: int) -> str:
    return f"{theirs} tokens with {DIGEST}{ON.format(1)}, {ours} tokens with {DIGEST}{ON.format(0)}"


ANSWERS = {
    "folder": rf"{NOT_SHARED.format('runs/.+')}.*\(FOLDER/node1/runs/.+ there: No such .*\{REMEDY}",
    "folder to go on in": rf"{NOT_SHARED.format('run')}.* No such file or directory\{REMEDY}",
    "folder that both have": rf"\(FOLDER/node1/both there is another folder\{REMEDY}",
    "folder that is closed": rf"\(FOLDER/run there: Permission denied\{REMEDY}",
    "no checkpoints": "^completed$",
    "tokens": f"differ in training shard 1, train.bin: {tokens(10000, 10000)}{SAME_INPUTS}",
    "test tokens": f"differ in test shard 1, test.bin: {tokens(1900, 2000)}{SAME_INPUTS}",
    "class": f"nodes differ in mine.Mine: {BOTH}, and 1 more{SAME_INPUTS}",
    "module of a class": f"nodes differ in helper: {BOTH}{SAME_INPUTS}",
    "class on rank 0 alone": "^rank 1: w2s: Error loading 'only0.Mine'",
    "class on rank 1 alone": "^rank 0: s2w: Error loading 'only1.Mine'",
    "inner class on rank 1 alone": "^rank 0: optimizer: Error loading 'only1.Mine'",
    "tokens on rank 0 alone": "^rank 1: .*only0.bin: 0 matching files, expected 1; ",
    "tokens on rank 1 alone": "^rank 0: .*only1.bin: 0 matching files, expected 1; ",
    "torch": rf"nodes differ in torch: 1.0.0{ON.format(1)}, \d+\.[\d.]+{ON.format(0)}{SAME_CODE}",
    "torch for another device": "^completed$",
    "code": f"nodes differ in training.log: {BOTH}{SAME_CODE}",
    "nothing": "^completed$",
}


@pytest.mark.parametrize("case", ANSWERS)
def test_what_differs_between_nodes_is_told_before_the_training(folder, case):
    answers = [json.loads((folder / f"answers{rank}.json").read_text()) for rank in range(2)]
    assert answers[0].keys() == ANSWERS.keys()
    pattern = ANSWERS[case].replace("FOLDER", re.escape(str(folder)))
    for answer in answers:
        assert re.search(pattern, answer[case]), answer[case]


def test_nothing_is_left_of_runs_that_did_not_start(folder):
    for node in ("node0", "node1"):
        left = {path.name for path in (folder / node).iterdir()}
        made = {"train.bin", "test.bin", "mine.py", "within.py", "helper.py", "__pycache__"}
        made |= {f"only{node[-1]}.py", f"only{node[-1]}.bin", "runs", "both"}
        assert left <= made
    assert not list(folder.rglob("shared.*"))


@pytest.mark.parametrize("size", [1, 1000, 3 * SAMPLES * SAMPLE_TOKENS])
def test_shards_are_known_by_their_size_their_ends_and_samples(tmp_path, monkeypatch, size):
    def told(tokens):
        write_shard(tmp_path / "one.bin", tokens)
        ((path, told),) = TokenStream([tmp_path / "one.bin"], 256, "").fingerprints()
        assert path == tmp_path / "one.bin"
        return told

    monkeypatch.setattr("data.loader.WHOLE_TOKENS", 1000)
    tokens = np.random.default_rng(0).integers(0, 256, size=size)
    found = {told(tokens), told(np.append(tokens, 0)), told(np.roll(tokens, 1) + (size == 1))}
    for place in {0, size // 2, size - 1} if size <= 1000 else {0, size - 1}:
        changed = tokens.copy()
        changed[place] = 256 - changed[place]
        found.add(told(changed))
    assert len(found) == (4 if size == 1 else 6 if size == 1000 else 5)
    assert told(tokens) in found
