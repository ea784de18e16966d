"""Shards: what is written comes back, and damage is named."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.shards import ShardError, open_shard, write_shard

REBUILD = "python make_the_shard.py"


@given(tokens=st.lists(st.integers(0, 65535), min_size=1), dtype=st.sampled_from(["i8", ">i4"]))
def test_tokens_come_back(tmp_path_factory, tokens, dtype):
    path = tmp_path_factory.mktemp("shards") / "tokens.bin"
    write_shard(path, np.array(tokens, dtype=dtype))
    read = open_shard(path, REBUILD)
    assert read.tolist() == tokens
    assert read.dtype == np.uint16
    with pytest.raises(ValueError, match="read-only"):
        read[0] = 0


def test_bytes_on_disk_are_the_published_format(tmp_path):
    path = tmp_path / "tokens.bin"
    write_shard(path, np.array([1, 258]))
    content = path.read_bytes()
    assert content[:12] == bytes.fromhex("88 d8 34 01  01 00 00 00  02 00 00 00")
    assert content[12:1024] == bytes(1012)
    assert content[1024:] == bytes([1, 0, 2, 1])


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (np.array([0, 65536]), "range from 0 to 65536: give tokens from 0 to 65535"),
        (np.array([-1, 5]), "range from -1 to 5: give tokens from 0 to 65535"),
        (np.array([], dtype=np.int64), "at least one integer"),
        (np.array([1.0]), "at least one integer"),
        (np.array([[1, 2]]), "one dimension"),
    ],
)
def test_what_cannot_be_stored_is_refused_and_nothing_is_written(tmp_path, tokens, message):
    with pytest.raises(ValueError, match=message):
        write_shard(tmp_path / "tokens.bin", tokens)
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_write_leaves_the_old_shard(tmp_path, monkeypatch):
    path = tmp_path / "tokens.bin"
    write_shard(path, np.arange(10))

    def fail(_):
        raise OSError("disk full")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        write_shard(path, np.arange(20))
    assert open_shard(path, REBUILD).tolist() == list(range(10))


def header(magic=20240520, version=1, count=3):
    entries = np.zeros(256, dtype="<i4")
    entries[:3] = magic, version, count
    return entries.tobytes()


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, "no such file"),
        (b"", "0 bytes, shorter than the header of 1024 bytes"),
        (header()[:1023], "1023 bytes, shorter than the header of 1024 bytes"),
        (header(magic=7) + bytes(6), "magic number 7, expected 20240520"),
        (header(version=2) + bytes(6), "format version 2, expected 1"),
        (header() + bytes(4), "1028 bytes, expected 1030 for the 3 tokens of its header"),
        (header() + bytes(5), "1029 bytes, expected 1030 for the 3 tokens of its header"),
        (header() + bytes(7), "1031 bytes, expected 1030 for the 3 tokens of its header"),
        (header(count=-3) + bytes(6), "1030 bytes, expected 1018 for the -3 tokens of its header"),
        (header(count=0), "0 tokens, expected at least 1"),
    ],
)
def test_damage_is_named(tmp_path, content, problem):
    path = tmp_path / "tokens.bin"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ShardError) as error:
        open_shard(path, REBUILD)
    assert str(error.value) == f"{path}: {problem}; rebuild with: {REBUILD}"


@given(cut=st.integers(1, 1024 + 2 * 50))
def test_every_truncation_is_found(tmp_path_factory, cut):
    path = tmp_path_factory.mktemp("shards") / "tokens.bin"
    write_shard(path, np.arange(50))
    path.write_bytes(path.read_bytes()[:-cut])
    with pytest.raises(ShardError, match="bytes"):
        open_shard(path, REBUILD)
