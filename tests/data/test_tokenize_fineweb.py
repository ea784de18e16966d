"""Shards from text, token for token as tiktoken encodes it, with the real GPT-2 vocabulary."""

import itertools
import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import tiktoken
from hub_server import running_hub
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from run import PATIENCE, ROOT
from waiting import runs, wait_until

from data import fineweb, tokenize_fineweb
from data.manifest import Manifest
from data.shards import ShardError, open_shard, write_shard
from data.tokenize_fineweb import local_files, tokenize

COMMAND = "python data/fineweb.py tokenize"
END_OF_TEXT = 50256

pytestmark = pytest.mark.usefixtures("gpt2_vocabulary")


def make_texts(count, seed=0):
    """Documents of English words and of any characters, with some that are awkward."""
    generator = np.random.default_rng(seed)
    words = (ROOT / "README.md").read_text().split(" ")
    awkward = [
        "",
        " ",
        "<|endoftext|>",
        "\n\n\n  a\t b",
        "naïve café 東京 👩🏽‍🚀",
        "a" * 3000,
        "\x00",
    ]
    texts = []
    for index in range(count):
        length = int(generator.integers(1, 120))
        if index % 5 == 0:
            texts.append(awkward[index // 5 % len(awkward)])
        elif index % 5 == 1:
            points = generator.integers(32, 0x3000, size=length)
            texts.append("".join(map(chr, points)))
        else:
            texts.append(" ".join(generator.choice(words, size=length)))
    return texts


def expected_tokens(texts):
    encoding = tiktoken.get_encoding("gpt2")
    return [token for text in texts for token in (END_OF_TEXT, *encoding.encode_ordinary(text))]


def write_parquet(path, texts, rows=50):
    table = {"id": list(map(str, range(len(texts)))), "text": pyarrow.array(texts, "string")}
    pyarrow.parquet.write_table(pyarrow.table(table), path, row_group_size=rows)
    return path


@pytest.fixture(scope="module")
def texts():
    return make_texts(900)


@pytest.fixture(scope="module")
def parquet(texts, tmp_path_factory):
    """Three files with these texts: small row groups, none, one large."""
    directory = tmp_path_factory.mktemp("text")
    return [
        write_parquet(directory / "a.parquet", texts[:600], rows=50),
        write_parquet(directory / "b.parquet", []),
        write_parquet(directory / "c.parquet", texts[600:], rows=1000),
    ]


def names(count):
    return ["fineweb_val_000000.bin", *(f"fineweb_train_{i:06d}.bin" for i in range(1, count))]


def read(directory, shard_tokens):
    """Return all tokens in order, and check that every shard but the last is full."""
    present = {path.name for path in directory.glob("*.bin*")}
    shards = [open_shard(directory / name, COMMAND) for name in names(len(present))]
    assert all(len(shard) == shard_tokens for shard in shards[:-1])
    assert 1 <= len(shards[-1]) <= shard_tokens
    return np.concatenate(shards).tolist()


def content(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_tokens_are_those_of_tiktoken_however_many_encode(tmp_path, texts, parquet, threads):
    """Threads, here; processes do in a run from the hub, below."""
    expected = expected_tokens(texts)
    files = local_files(parquet)
    for processes in (1, 3):
        tokenize(tmp_path / str(processes), files, 5000, processes, COMMAND)
    assert read(tmp_path / "1", 5000) == expected
    assert content(tmp_path / "1") == content(tmp_path / "3")
    manifest = fineweb.verify(tmp_path / "1")
    assert manifest.train_shards == -(-len(expected) // 5000) - 1
    assert sum(shard["tokens"] for shard in manifest.shards.values()) == len(expected)


@pytest.fixture
def threads(monkeypatch):
    """Encode in threads, which start at once."""
    monkeypatch.setattr(
        tokenize_fineweb,
        "ProcessPoolExecutor",
        lambda processes, context, initializer: ThreadPoolExecutor(processes),
    )


class Stopped(Exception):
    pass


@settings(
    max_examples=15,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    texts=st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=40), max_size=30),
    files=st.integers(1, 3),
    batch=st.integers(1, 8),
    shard_tokens=st.integers(1, 60),
    stops=st.lists(st.integers(1, 4), max_size=3),
    before_recording=st.booleans(),
)
def test_a_stopped_run_goes_on_to_the_same_shards(
    tmp_path_factory, threads, texts, files, batch, shard_tokens, stops, before_recording
):
    """It is stopped after so many shards, several times, before or after a shard is recorded."""
    texts = ["at least two tokens", *texts]
    directory = tmp_path_factory.mktemp("stopped")
    pieces = [texts[index::files] for index in range(files)]
    paths = [
        write_parquet(directory / f"{index}.parquet", piece, rows=5)
        for index, piece in enumerate(pieces)
    ]
    expected = expected_tokens(itertools.chain(*pieces))
    shard_tokens = min(shard_tokens, len(expected) - 1)
    arguments = (directory / "out", local_files(paths), shard_tokens, 2, COMMAND)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenize_fineweb, "BATCH", batch)
        for stop in stops:
            with pytest.MonkeyPatch.context() as stopping:
                stop_after(stop, before_recording, stopping)
                try:
                    tokenize(*arguments)
                except Stopped:
                    with pytest.raises(ShardError, match="not all shards are made yet"):
                        fineweb.verify(directory / "out")
        tokenize(*arguments)
    assert read(directory / "out", shard_tokens) == expected
    assert fineweb.verify(directory / "out").train_shards == -(-len(expected) // shard_tokens) - 1


def stop_after(shards, before_recording, patch):
    record = Manifest.record
    left = itertools.count(shards - 1, -1)

    def stopping_record(*arguments, **origin):
        last = next(left) == 0
        if last and before_recording:
            raise Stopped
        record(*arguments, **origin)
        if last:
            raise Stopped

    patch.setattr(Manifest, "record", stopping_record)


def start(*arguments, **environment):
    command = [sys.executable, ROOT / "data" / "fineweb.py", *map(str, arguments)]
    return subprocess.Popen(
        command, env=os.environ | environment, stdout=-1, stderr=subprocess.STDOUT, text=True
    )


def finish(process):
    output, _ = process.communicate(timeout=PATIENCE)
    return process.returncode, output


@pytest.mark.skipif(sys.platform != "linux", reason="children are read from /proc")
def test_a_killed_run_from_the_hub_goes_on_with_the_same_text(tmp_path, texts, parquet):
    """The second run starts when the hub has a newer revision; the first one counts.

    It has one process fewer: the shards do not depend on their number.

    The hub keeps back the third file, so the first run comes to eight shards at most: what is in
    the first file, of which some is kept ahead for two processes.
    """
    repository = tokenize_fineweb.REPOSITORY
    paths = [f"sample/10BT/{index:03d}_00000.parquet" for index in range(len(parquet))]
    with running_hub() as hub:
        for path, file in zip(paths, parquet, strict=True):
            hub.datasets[repository][path] = file.read_bytes()
        hub.datasets[repository]["sample/100BT/000_00000.parquet"] = b"of another sample"
        environment = {
            "HF_ENDPOINT": hub.endpoint,
            "HF_HOME": str(tmp_path / "home"),
            "NO_PROXY": "127.0.0.1,localhost",
        }
        out = tmp_path / "out"
        command = ("tokenize", "--shard-tokens", 2000, "--processes", 2, "--out", out)
        hub.faults["FETCH", paths[2]] = itertools.repeat({"stall": 0})
        process = start(*command, **environment)
        try:
            wait_until(lambda: (out / names(2)[-1]).exists())
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
            workers = children.read_text().split()
        finally:
            process.kill()
            process.wait()
        assert len(workers) >= 2
        wait_until(lambda: not any(map(runs, workers)))
        finished = {name: (out / name).stat().st_mtime_ns for name in recorded(out)}
        assert set(finished) >= {names(1)[0]}
        assert not (out / names(9)[-1]).exists()

        hub.faults.clear()
        revision, hub.revision = hub.revision, "b" * 40
        status, output = finish(start(*command, "--processes", 1, **environment))
        assert status == 0, output
        assert read(out, 2000) == expected_tokens(texts)
        assert finished == {name: (out / name).stat().st_mtime_ns for name in finished}
        source = json.loads((out / "manifest.json").read_text())["source"]
        assert (source["repository"], source["revision"]) == (repository, revision)
        assert [path for path, _ in source["files"]] == paths
        assert hub.resolved == {revision}
        assert f"{out}: 1 test shard and {len(recorded(out)) - 1} training shards" in output


def recorded(directory):
    return json.loads((directory / "manifest.json").read_text())["shards"]


def test_a_damaged_shard_is_made_again(tmp_path, texts, parquet, threads):
    arguments = (tmp_path, local_files(parquet), 5000, 2, COMMAND)
    tokenize(*arguments)
    before = content(tmp_path)
    (tmp_path / names(3)[2]).write_bytes(b"damaged")
    with pytest.raises(ShardError, match=r"1 of \d+ shards missing or wrong"):
        fineweb.verify(tmp_path)
    first = (tmp_path / names(2)[1]).stat().st_mtime_ns
    tokenize(*arguments)
    assert content(tmp_path) == before
    assert (tmp_path / names(2)[1]).stat().st_mtime_ns == first


def test_a_finished_run_reads_no_text(tmp_path, parquet, threads, monkeypatch):
    arguments = (tmp_path, local_files(parquet), 5000, 2, COMMAND)
    manifest = tokenize(*arguments)
    monkeypatch.setattr(tokenize_fineweb, "_encoded", None)
    assert tokenize(*arguments) == manifest


def test_text_is_read_no_further_ahead_than_a_few_batches(monkeypatch, threads):
    read = []

    def endless_batches(urls, place):
        for row in itertools.count():
            read.append(row)
            yield {"file": 0, "row": row}, ["text"]

    monkeypatch.setattr(tokenize_fineweb, "_batches", endless_batches)
    encoded = tokenize_fineweb._encoded([], {}, 3)
    for taken in range(50):
        assert next(encoded)[0]["row"] == taken
        assert len(read) <= taken + 4 * 3 + 1
    encoded.close()


def test_shards_of_another_source_are_left_alone(tmp_path, parquet, threads):
    tokenize(tmp_path, local_files(parquet), 5000, 1, COMMAND)
    before = content(tmp_path)
    with pytest.raises(ValueError, match=r"another source \(shard_tokens is 5000 there and 6000"):
        tokenize(tmp_path, local_files(parquet), 6000, 1, COMMAND)
    with pytest.raises(ValueError, match=r"another source \(files is .*a.parquet"):
        tokenize(tmp_path, local_files(parquet[1:]), 5000, 1, COMMAND)
    with pytest.raises(ValueError, match="another source"):
        fineweb.download(tmp_path, 1, "")
    assert content(tmp_path) == before

    (tmp_path / "manifest.json").unlink()
    with pytest.raises(ValueError, match=r"shards without manifest.json: .* --out"):
        tokenize(tmp_path, local_files(parquet), 5000, 1, COMMAND)


@pytest.mark.parametrize("shard_tokens", [6, 7, 1000])
def test_text_for_the_test_shard_alone_is_an_error(tmp_path, threads, shard_tokens):
    parquet = write_parquet(tmp_path / "a.parquet", ["One two three", ""])
    tokens = len(expected_tokens(["One two three", ""]))
    assert tokens == 5
    out = tmp_path / "out"
    with pytest.raises(ValueError, match=r"^5 tokens fill the test shard alone: use fewer --shard"):
        tokenize(out, local_files([parquet]), max(shard_tokens, tokens), 1, COMMAND)
    assert tokenize(out, local_files([parquet]), 3, 1, COMMAND).train_shards == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--parquet", "none.parquet"], r"No such file .*none.parquet"),
        (["--parquet", "words.parquet"], "FieldRef.Name.text."),
        (["--parquet", "words.parquet", "--out", "."], "shards without manifest.json"),
        (
            ["--parquet", "a_gap.parquet", "--shard-tokens", "3"],
            "a_gap.parquet: row 2 has no text: give files in which every row has one",
        ),
    ],
)
def test_command_line_errors_are_one_line(tmp_path, threads, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    pyarrow.parquet.write_table(pyarrow.table({"words": ["a"]}), "words.parquet")
    write_parquet("a_gap.parquet", ["one", "two", None, "four"])
    write_shard("fineweb_val_000000.bin", np.arange(5))
    monkeypatch.setattr(sys, "argv", ["fineweb.py", "tokenize", "--out", "out", *arguments])
    with pytest.raises(SystemExit) as stop:
        fineweb.main()
    assert re.fullmatch(f"error: .*{message}.*", stop.value.code)
