"""Fetching and checking the FineWeb shards, from a hub on a loopback address."""

import hashlib
import itertools
import json
import os
import re
import subprocess
import sys
import time

import numpy as np
import pytest
from hub_server import running_hub
from huggingface_hub import constants
from omegaconf import OmegaConf
from run import PATIENCE, ROOT
from waiting import wait_until

from data import fineweb
from data.loader import open_streams
from data.shards import ShardError, write_shard

VAL, FIRST, SECOND = NAMES = [
    "fineweb_val_000000.bin",
    "fineweb_train_000001.bin",
    "fineweb_train_000002.bin",
]
COMMAND = "python data/fineweb.py download --shards 2"
TOKENS = 40_000
SIZE = 1024 + 2 * TOKENS
TOKEN = "hf_thisIsNobodysTokenAtAll"
REPOSITORY, TRAIN_SHARDS = "kjj0/fineweb10B-gpt2", 103
EDU, EDU_REPOSITORY, EDU_TRAIN_SHARDS = "finewebedu10B", "kjj0/finewebedu10B-gpt2", 99


def of_edu(name):
    """A shard's name in FineWeb-Edu."""
    return name.replace("fineweb", "finewebedu")


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """The content of three valid shards."""
    directory = tmp_path_factory.mktemp("published")
    generator = np.random.default_rng(0)
    for name in NAMES:
        write_shard(directory / name, generator.integers(0, 50257, size=TOKENS))
    return {name: (directory / name).read_bytes() for name in NAMES}


@pytest.fixture
def hub(shards, monkeypatch):
    """The running hub with these shards, which this process and its children talk to."""
    with running_hub() as hub:
        hub.datasets[REPOSITORY] |= shards
        hub.datasets[EDU_REPOSITORY] |= {of_edu(name): shard for name, shard in shards.items()}
        template = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
        yield hub


@pytest.fixture
def waits(monkeypatch):
    """The seconds that would have been waited between attempts."""
    waits = []
    monkeypatch.setattr(time, "sleep", waits.append)
    return waits


def download(directory, shards=2):
    return fineweb.download(directory, shards, COMMAND)


def content(directory):
    return {path.name: path.read_bytes() for path in directory.glob("*.bin*")}


def run(*arguments, **environment):
    """Run the script; returns its exit status, and standard output and error together."""
    command = [sys.executable, ROOT / "data" / "fineweb.py", *arguments]
    result = subprocess.run(
        command, env=os.environ | environment, stdout=-1, stderr=-2, text=True, timeout=PATIENCE
    )
    return result.returncode, result.stdout


def test_download_command_and_verify_command(tmp_path, hub, shards):
    hub.faults["HEAD", FIRST] = iter([{"status": 429, "headers": {"Retry-After": "0"}}])
    status, output = run("download", "--shards", "2", "--out", tmp_path, HF_TOKEN=TOKEN)
    assert status == 0, output
    assert f"{tmp_path}: 1 test shard and 2 training shards, 120,000 tokens" in output
    assert TOKEN not in output
    assert content(tmp_path) == shards

    assert hub.resolved == {"main", hub.revision}
    for method, _, _, authorization in hub.requests:
        assert authorization == (None if method == "FETCH" else f"Bearer {TOKEN}")

    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["source"] == {"repository": "kjj0/fineweb10B-gpt2"}
    assert manifest["train_shards"] == 2
    assert manifest["shards"] == {
        name: {
            "tokens": TOKENS,
            "sha256": hashlib.sha256(shards[name]).hexdigest(),
            "revision": hub.revision,
        }
        for name in NAMES
    }

    assert run("verify", "--out", tmp_path)[0] == 0
    (tmp_path / SECOND).unlink()
    status, output = run("verify", "--out", tmp_path)
    rebuild = f"python data/fineweb.py download --shards 2 --out {tmp_path}"
    assert status == 1
    assert f"error: {tmp_path / SECOND}: no such file; rebuild with: {rebuild}\n" in output
    assert output.endswith(f"1 of 3 shards missing or wrong; rebuild with: {rebuild}\n")


def test_a_killed_download_goes_on_where_it_stopped(tmp_path, hub, shards):
    hub.faults["FETCH", FIRST] = iter([{"stall": 60_000}])
    command = [sys.executable, ROOT / "data" / "fineweb.py", "download", "--shards", "1"]
    partial = tmp_path / f"{FIRST}.partial"
    with subprocess.Popen([*command, "--out", tmp_path], stderr=subprocess.DEVNULL) as process:
        try:
            wait_until(lambda: partial.exists() and partial.stat().st_size)
        finally:
            process.kill()
    received = partial.stat().st_size
    assert 0 < received <= 60_000
    assert set(content(tmp_path)) == {VAL, partial.name}

    download(tmp_path, 1)
    assert hub.seen("FETCH", FIRST) == ["bytes=0-", f"bytes={received}-"]
    assert hub.seen("HEAD", VAL) == [None]
    assert content(tmp_path) == {name: shards[name] for name in (VAL, FIRST)}


def test_an_interrupted_transfer_goes_on_where_it_stopped(tmp_path, hub, shards, waits):
    hub.faults["FETCH", FIRST] = iter([{"stop": 2000}, {"stop": 3000}])
    download(tmp_path)
    assert hub.seen("FETCH", FIRST) == ["bytes=0-", "bytes=2000-", "bytes=5000-"]
    assert content(tmp_path) == shards
    assert waits == [1, 2]


def test_a_server_that_ignores_ranges_sends_everything_again(tmp_path, hub, shards, waits):
    hub.faults["FETCH", FIRST] = iter([{"stop": 2000}, {"ranges": False}])
    download(tmp_path)
    assert len(hub.seen("FETCH", FIRST)) == 2
    assert content(tmp_path) == shards


@pytest.mark.parametrize(
    ("wrong", "problem", "kept"),
    [
        (lambda shard: shard[:-2], f"{SIZE - 2} bytes, expected {SIZE}", SIZE - 2),
        (lambda shard: shard + b"..", f"{SIZE + 2} bytes, expected {SIZE}", None),
        (lambda shard: shard[:-1] + bytes([shard[-1] ^ 1]), "SHA-256 .*, expected ", None),
    ],
)
def test_wrong_content_is_fetched_again_and_never_kept(
    tmp_path, hub, shards, waits, wrong, problem, kept
):
    fault = {"content": wrong(shards[FIRST])}
    hub.faults["FETCH", FIRST] = itertools.repeat(fault)
    with pytest.raises(RuntimeError, match=f"{FIRST} of .*: {problem}.*, after 5 attempts; .*run"):
        download(tmp_path)
    assert len(hub.seen("FETCH", FIRST)) == 5
    assert waits == [1, 2, 4, 8]
    there = {name: len(shard) for name, shard in content(tmp_path).items()}
    assert there == {VAL: SIZE} | ({f"{FIRST}.partial": kept} if kept else {})
    with pytest.raises(ShardError, match="2 of 3 shards missing or wrong"):
        fineweb.verify(tmp_path)

    hub.faults["FETCH", FIRST] = iter([fault])
    download(tmp_path)
    assert content(tmp_path) == shards


def test_a_missing_shard_is_an_error_at_once(tmp_path, hub, waits):
    del hub.datasets[REPOSITORY][SECOND]
    with pytest.raises(RuntimeError, match=f"^{SECOND} of {REPOSITORY}: .* HTTP 404;"):
        download(tmp_path)
    assert hub.seen("HEAD", SECOND) == [None]
    assert waits == []
    assert set(content(tmp_path)) == {VAL, FIRST}
    with pytest.raises(ShardError, match="1 of 3 shards missing"):
        fineweb.verify(tmp_path)


@pytest.mark.parametrize("method", ["HEAD", "GET"])
def test_too_many_requests_are_waited_for_as_told(tmp_path, hub, shards, waits, method):
    refusal = {"status": 429, "headers": {"Retry-After": "70"}}
    hub.faults[method, FIRST] = iter([refusal, refusal])
    download(tmp_path)
    assert content(tmp_path) == shards
    assert len(waits) == 2
    assert all(70 <= wait <= 71 for wait in waits)

    (tmp_path / FIRST).unlink()
    hub.faults[method, FIRST] = itertools.repeat(refusal)
    with pytest.raises(RuntimeError, match=f"{FIRST} .*: the hub answers HTTP 429; to go on"):
        download(tmp_path)
    assert len(waits) < 10


def test_a_file_of_the_hub_that_is_no_shard_is_refused(tmp_path, hub, waits):
    hub.datasets[REPOSITORY][FIRST] = b"no such page"
    with pytest.raises(ShardError, match=f"{FIRST}.* 12 bytes, shorter .* with: {COMMAND}$"):
        download(tmp_path)
    assert set(content(tmp_path)) == {VAL}


def test_a_hub_without_hashes_is_refused(tmp_path, hub):
    hub.faults["HEAD", VAL] = iter([{"headers": {"X-Linked-ETag": '"0123456789abcdef"'}}])
    with pytest.raises(RuntimeError, match=f"{VAL} .* no SHA-256"):
        download(tmp_path)
    assert content(tmp_path) == {}


def test_no_connection_is_one_line(tmp_path, hub, waits, monkeypatch):
    template = "http://127.0.0.1:9/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    with pytest.raises(RuntimeError, match=f"^{VAL} .*: no connection .*; .* run again: [^\n]*$"):
        download(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(sys, "argv", ["fineweb.py", "download", "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"^error: .*HF_HUB_OFFLINE[^\n]*$"):
        fineweb.main()


def test_what_is_there_is_kept_if_right(tmp_path, hub, shards):
    (tmp_path / VAL).write_bytes(shards[VAL])  # by hand: no manifest
    (tmp_path / FIRST).write_bytes(shards[FIRST][:-1] + b"?")
    download(tmp_path)
    assert (hub.seen("FETCH", VAL), hub.seen("FETCH", FIRST)) == ([], ["bytes=0-"])
    assert content(tmp_path) == shards
    fineweb.verify(tmp_path)

    hub.requests.clear()
    hub.revision = "b" * 40
    (tmp_path / SECOND).write_bytes(shards[SECOND][:-2])
    download(tmp_path)
    assert {path for _, path, _, _ in hub.requests} == {SECOND}
    assert content(tmp_path) == shards
    entries = json.loads((tmp_path / "manifest.json").read_text())["shards"]
    assert [entries[name]["revision"][0] for name in NAMES] == ["a", "a", "b"]


def test_the_number_of_shards_of_a_complete_set_follows_the_last_command(tmp_path, hub):
    hub.faults["HEAD", SECOND] = iter([{"status": 404}])
    with pytest.raises(RuntimeError, match="HTTP 404"):
        download(tmp_path, 2)
    assert download(tmp_path, 1).train_shards == 1
    fineweb.verify(tmp_path)
    assert download(tmp_path, 2).train_shards == 2
    manifest = fineweb.download(tmp_path, 1, "another command")
    assert (manifest.train_shards, manifest.rebuild) == (2, "another command")
    assert fineweb.verify(tmp_path) == manifest


def flip_last_bit(path):
    shard = path.read_bytes()
    path.write_bytes(shard[:-1] + bytes([shard[-1] ^ 1]))


@pytest.mark.parametrize(
    ("damage", "name", "problem"),
    [
        (lambda path: path.unlink(), VAL, "no such file"),
        (lambda path: os.truncate(path, SIZE - 1), FIRST, f"{SIZE - 1} bytes, expected {SIZE} "),
        (flip_last_bit, SECOND, "SHA-256 [0-9a-f]{64}, expected [0-9a-f]{64}"),
        (lambda path: path.write_bytes(b"?" * SIZE), FIRST, "magic number "),
        (lambda path: write_shard(path, np.arange(9)), SECOND, "9 tokens, expected 40000"),
        (lambda path: write_shard(path, np.arange(9)), "fineweb_train_000003.bin", "not in manif"),
    ],
)
def test_verify_names_what_is_wrong(tmp_path, hub, capsys, damage, name, problem):
    download(tmp_path)
    fineweb.verify(tmp_path)
    damage(tmp_path / name)
    capsys.readouterr()
    with pytest.raises(
        ShardError, match=f"1 of [34] shards missing or wrong; rebuild with: {COMMAND}$"
    ):
        fineweb.verify(tmp_path)
    (line,) = [line for line in capsys.readouterr().err.split("\n") if "error: " in line]
    assert line.split("error: ")[1].startswith(f"{tmp_path / name}: ")
    assert re.search(f": {problem}", line)


@pytest.mark.parametrize("text", [None, "{", "[1]", '{"shards": {}}'])
def test_verify_without_a_manifest(tmp_path, text):
    if text is not None:
        (tmp_path / "manifest.json").write_text(text)
    problem = "no such file" if text is None else "not a manifest"
    with pytest.raises(ShardError, match=f"manifest.json: {problem}.*fineweb.py download"):
        fineweb.verify(tmp_path)


@pytest.mark.parametrize(
    ("dataset", "name", "told", "train_shards"),
    [
        ("fineweb10B", "fineweb10b", "", TRAIN_SHARDS),
        (EDU, "fineweb_edu10b", f"--dataset {EDU} ", EDU_TRAIN_SHARDS),
    ],
)
def test_training_reads_what_was_downloaded(
    tmp_path, hub, shards, dataset, name, told, train_shards
):
    directory = tmp_path / "data" / dataset
    fineweb.download(directory, 2, COMMAND, fineweb.DATASETS[dataset])
    config = OmegaConf.create({"data": OmegaConf.load(ROOT / "configs" / "data" / f"{name}.yaml")})
    assert (config.data.vocab_size, config.data.train_shards) == (50257, train_shards)
    config.data.train_shards = 3
    options = OmegaConf.to_container(config.data, resolve=True)
    assert options.pop("name") == name
    command = f"python data/fineweb.py download {told}--shards 3"
    with pytest.raises(ShardError, match=f"2 matching files, .*: {command}$"):
        open_streams(**options, root=tmp_path)
    train, test = open_streams(**{**options, "train_shards": 2}, root=tmp_path)
    assert (len(train), len(test)) == (2 * TOKENS, TOKENS)
    first = np.frombuffer(shards[FIRST][1024:], dtype=np.uint16)
    assert train.read(0, TOKENS).tolist() == first.tolist()


def test_commands_for_fineweb_edu(tmp_path, hub, shards, monkeypatch, capsys):
    """In a folder of its own, which does not take FineWeb's, and is not taken for it."""
    published = {of_edu(name): shard for name, shard in shards.items() if name != SECOND}
    command = ["--dataset", EDU, "--out", str(tmp_path)]

    def run_main(*arguments):
        monkeypatch.setattr(sys, "argv", ["fineweb.py", *arguments])
        fineweb.main()

    run_main("download", "--shards", "1", *command)
    assert "1 test shard and 1 training shards, 80,000 tokens" in capsys.readouterr().out
    assert content(tmp_path) == published
    assert {path for _, path, _, _ in hub.requests} == published.keys()
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["source"] == {"repository": EDU_REPOSITORY}
    run_main("verify", *command)
    (tmp_path / of_edu(FIRST)).unlink()
    with pytest.raises(SystemExit, match=f"1 of 2 shards .* download --shards 1 --dataset {EDU} "):
        run_main("verify", *command)
    with pytest.raises(
        SystemExit, match=f"another source .*{EDU_REPOSITORY} there and {REPOSITORY}"
    ):
        run_main("download", "--shards", "1", "--out", str(tmp_path))
    assert f"error: {tmp_path / of_edu(FIRST)}: no such file" in capsys.readouterr().err


def test_folders_are_named_by_the_data_set(monkeypatch):
    """Where configs/data look for them."""
    folders = []
    monkeypatch.setattr(fineweb, "_run", lambda options: folders.append(options.out) or sys.exit())
    for told in ([], ["--dataset", EDU]):
        monkeypatch.setattr(sys, "argv", ["fineweb.py", "verify", *told])
        with pytest.raises(SystemExit):
            fineweb.main()
    assert folders == [ROOT / "data" / "fineweb10B", ROOT / "data" / EDU]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["download", "--shards", "0"], "--shards is 0: use 1 to 103"),
        (["download", "--shards", "104"], "--shards is 104: use 1 to 103"),
        (["download", "--dataset", EDU, "--shards", "100"], "--shards is 100: use 1 to 99"),
        (["tokenize", "--processes", "0"], "--processes is 0: use 1 to 1024"),
        (["tokenize", "--shard-tokens", "0"], "--shard-tokens is 0: use 1 to 2147483647"),
    ],
)
def test_numbers_are_checked(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.setattr(sys, "argv", ["fineweb.py", *arguments, "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as stop:
        fineweb.main()
    assert stop.value.code == 2
    assert capsys.readouterr().err.endswith(f"error: {message}\n")
    assert list(tmp_path.iterdir()) == []
