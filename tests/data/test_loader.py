"""Token shards as one stream, windows that workers draw from it, and test windows."""

import json
from queue import Queue
from threading import get_ident

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from run import PATIENCE

from data.loader import Prefetched, TestWindows, TokenStream, WorkerBatches, open_streams
from data.shards import ShardError, write_shard

REBUILD = "python make_the_shards.py"


def make_stream(directory, *shards, vocab_size=65536):
    paths = [directory / f"{index:06d}.bin" for index in range(len(shards))]
    for path, tokens in zip(paths, shards, strict=True):
        write_shard(path, np.asarray(tokens))
    return TokenStream(paths, vocab_size, REBUILD)


@pytest.fixture(scope="module")
def positions(tmp_path_factory):
    """A stream of 1000 tokens in three shards in which every token is its own position."""
    directory = tmp_path_factory.mktemp("positions")
    return make_stream(directory, np.arange(300), np.arange(300, 301), np.arange(301, 1000))


@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=5), data=st.data())
def test_shards_read_as_one_sequence(tmp_path_factory, sizes, data):
    bounds = np.cumsum([0, *sizes])
    shards = [np.arange(*bounds[i : i + 2]) for i in range(len(sizes))]
    stream = make_stream(tmp_path_factory.mktemp("stream"), *shards)
    assert len(stream) == sum(sizes)
    start = data.draw(st.integers(0, len(stream) - 1))
    length = data.draw(st.integers(1, len(stream) - start))
    tokens = stream.read(start, length)
    assert tokens.dtype == np.int64
    assert tokens.tolist() == list(range(start, start + length))


@pytest.mark.parametrize(("start", "length"), [(-1, 2), (0, 0), (999, 2), (0, 1001), (2000, 1)])
def test_reading_outside_the_stream_is_an_error(positions, start, length):
    with pytest.raises(IndexError, match="inside a stream of 1000"):
        positions.read(start, length)


def test_token_outside_the_vocabulary_names_its_file(tmp_path):
    stream = make_stream(tmp_path, [0, 1, 2], [3, 4, 5], vocab_size=5)
    assert stream.read(0, 5).tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(ShardError) as error:
        stream.read(2, 4)
    problem = "token 5 is outside the vocabulary of 5"
    assert str(error.value) == f"{tmp_path / '000001.bin'}: {problem}; rebuild with: {REBUILD}"


@given(context=st.integers(1, 60), workers=st.integers(1, 16), seed=st.integers(0, 2**32))
def test_workers_draw_only_from_their_own_equal_parts(positions, context, workers, seed):
    part = 1000 // workers
    for worker in range(workers):
        batches = WorkerBatches(positions, context, worker, workers, seed)
        inputs, targets = batches.next(20)
        assert inputs.shape == targets.shape == (20, context)
        assert inputs.dtype == targets.dtype == torch.int64
        assert torch.equal(targets, inputs + 1)
        assert torch.equal(inputs, inputs[:, :1] + torch.arange(context))
        assert inputs.min() >= worker * part
        assert targets.max() < (worker + 1) * part


@pytest.mark.parametrize(("worker", "start"), [(0, 0), (2, 20)])
def test_every_window_of_a_part_can_be_drawn(tmp_path, worker, start):
    stream = make_stream(tmp_path, np.arange(32))
    inputs, _ = WorkerBatches(stream, 4, worker, 3, seed=0).next(500)
    assert set(inputs[:, 0].tolist()) == set(range(start, start + 6))


def test_windows_follow_from_seed_and_worker(positions):
    def draw(worker, seed):
        return WorkerBatches(positions, 8, worker, 2, seed).next(16)[0]

    assert torch.equal(draw(0, 1), draw(0, 1))
    assert not torch.equal(draw(0, 1), draw(0, 2))
    assert not torch.equal(draw(0, 1), draw(1, 1) - 500)


@given(before=st.lists(st.integers(1, 5), max_size=4), seed=st.integers(0, 2**32))
def test_restored_state_continues_exactly(positions, before, seed):
    batches = WorkerBatches(positions, 8, 0, 2, seed)
    for sequences in before:
        batches.next(sequences)
    saved = json.dumps(batches.state_dict())
    expected = [batches.next(sequences)[0] for sequences in (3, 4)]

    restored = WorkerBatches(positions, 8, 0, 2, seed=0)
    restored.load_state_dict(json.loads(saved))
    assert all(torch.equal(restored.next(len(inputs))[0], inputs) for inputs in expected)


OPERATIONS = st.one_of(
    st.tuples(st.just("next"), st.integers(1, 3)),
    st.tuples(st.sampled_from(["state_dict", "load_state_dict"]), st.none()),
    st.tuples(st.just("restart"), st.integers(0, 5)),
)


@given(operations=st.lists(OPERATIONS, max_size=12), seed=st.integers(0, 9))
def test_reading_ahead_gives_the_same_batches_and_states(positions, operations, seed):
    plain = WorkerBatches(positions, 8, 0, 2, seed)
    ahead = Prefetched(WorkerBatches(positions, 8, 0, 2, seed))
    saved = plain.state_dict()
    for name, argument in operations:
        argument = saved if name == "load_state_dict" else argument
        arguments = () if name == "state_dict" else (argument,)
        expected, found = (getattr(batches, name)(*arguments) for batches in (plain, ahead))
        if name == "next":
            assert all(map(torch.equal, expected, found))
        else:
            assert expected == found
        saved = expected if name == "state_dict" else saved
    assert plain.state_dict() == ahead.state_dict()


def test_the_next_batch_is_read_before_it_is_asked_for(positions):
    reads = Queue()

    class Told(WorkerBatches):
        def next(self, sequences):
            reads.put(get_ident())
            return super().next(sequences)

    ahead = Prefetched(Told(positions, 8, 0, 1, seed=0))
    for _ in range(3):
        ahead.next(2)
    readers = [reads.get(timeout=PATIENCE) for _ in range(4)]
    assert get_ident() not in readers


def test_reading_ahead_raises_at_the_batch_that_cannot_be_read(tmp_path):
    tokens = np.zeros(1000, dtype=int)
    tokens[700:] = 9  # outside the vocabulary
    stream = make_stream(tmp_path, tokens, vocab_size=5)

    def batches_before_an_error(batches):
        for count in range(1000):
            try:
                batches.next(1)
            except ShardError as error:
                return count, str(error)

    for seed in range(10):
        plain = WorkerBatches(stream, 8, 0, 1, seed)
        expected = batches_before_an_error(WorkerBatches(stream, 8, 0, 1, seed))
        assert batches_before_an_error(Prefetched(plain)) == expected


def test_part_of_exactly_one_window_is_enough(positions):
    inputs, targets = WorkerBatches(positions, 249, 3, 4, seed=0).next(1)
    assert (inputs[0, 0], targets[0, -1]) == (750, 999)


@pytest.mark.parametrize(
    ("context", "workers", "message"),
    [
        (
            250,
            4,
            "1000 training tokens over 4 workers leave 250 tokens each, "
            "fewer than one window of 251: use at most 3 workers",
        ),
        (
            1000,
            1,
            "1000 training tokens over 1 workers leave 1000 tokens each, "
            "fewer than one window of 1001: use a context below 1000",
        ),
    ],
)
def test_too_many_workers_for_the_tokens(positions, context, workers, message):
    with pytest.raises(ValueError) as error:
        WorkerBatches(positions, context, 0, workers, seed=0)
    assert str(error.value) == message


@given(context=st.integers(1, 40), sequences=st.integers(1, 7), data=st.data())
def test_test_windows_do_not_depend_on_the_workers(positions, context, sequences, data):
    tokens = data.draw(st.integers(context, 999 // context * context))
    test = TestWindows(positions, context, tokens)
    assert len(test) == tokens // context

    [everything] = test.batches(0, 1, len(test))
    starts = everything[0][:, 0]
    assert starts.tolist() == [999 // len(test) * window for window in range(len(test))]
    assert torch.all(torch.diff(starts) >= context)
    assert starts[0] == 0
    assert 1000 - everything[1][-1, -1] <= 1000 // len(test) + len(test)

    for workers in (1, 2, 3, 5):
        for worker in range(workers):
            batches = list(test.batches(worker, workers, sequences))
            sizes = [len(inputs) for inputs, _, _ in batches]
            assert all(size == sequences for size in sizes[:-1])
            assert [context * size for size in sizes] == [counted for *_, counted in batches]
            for kind in (0, 1):
                expected = everything[kind][worker::workers]
                rows = [batch[kind] for batch in batches] or [expected[:0]]
                assert torch.equal(torch.cat(rows), expected)


@given(windows=st.integers(1, 20), workers=st.integers(1, 5), sequences=st.integers(1, 4))
def test_workers_that_compute_together_read_as_often(positions, windows, workers, sequences):
    """And what they read beside their own windows counts for nothing."""
    test = TestWindows(positions, 10, 10 * windows)
    every = [list(test.batches(worker, workers, sequences, True)) for worker in range(workers)]
    assert len({len(batches) for batches in every}) == 1
    for worker, batches in enumerate(every):
        own = list(test.batches(worker, workers, sequences))
        for batch, expected in zip(batches, own, strict=False):
            assert all(map(torch.equal, batch[:2], expected[:2])) and batch[2] == expected[2]
        for inputs, targets, counted in batches[len(own) :]:
            assert inputs.shape == targets.shape == (1, 10) and counted == 0


def test_whole_test_set_is_read_without_gap(tmp_path):
    stream = make_stream(tmp_path, np.arange(41))
    [(inputs, targets, _)] = TestWindows(stream, context=8, tokens=40).batches(0, 1, 5)
    assert inputs.flatten().tolist() == list(range(40))
    assert targets.flatten().tolist() == list(range(1, 41))


@pytest.mark.parametrize(
    ("context", "tokens", "message"),
    [
        (8, 1000, "1000 test tokens wanted in windows of 8 from a test set of 1000: use 8 to 992"),
        (8, 7, "7 test tokens wanted in windows of 8 from a test set of 1000: use 8 to 992"),
        (
            1000,
            1000,
            "1000 test tokens are fewer than one window of 1001: use a context below 1000",
        ),
    ],
)
def test_impossible_test_sets(positions, context, tokens, message):
    with pytest.raises(ValueError) as error:
        TestWindows(positions, context, tokens)
    assert str(error.value) == message


def write_numbered_shards(directory, names):
    for index, name in enumerate(names):
        write_shard(directory / name, np.full(10, index))


def test_first_shards_in_sorted_order_are_opened(tmp_path):
    write_numbered_shards(tmp_path, ["test_0.bin", "train_1.bin", "train_2.bin", "train_3.bin"])
    train, test = open_streams("train_*.bin", "test_0.bin", 2, 256, REBUILD, tmp_path)
    assert train.read(0, 20).tolist() == [1] * 10 + [2] * 10
    assert (len(train), len(test)) == (20, 10)
    absolute = str(tmp_path / "t*_3.bin")
    train, _ = open_streams(absolute, absolute, 1, 256, REBUILD, "/nowhere")
    assert train.read(0, 1) == 3


@pytest.mark.parametrize(
    ("train_shards", "test", "pattern", "problem"),
    [
        (3, "test_*.bin", "train_*.bin", "2 matching files, expected 3"),
        (2, "none_*.bin", "none_*.bin", "0 matching files, expected 1"),
    ],
)
def test_missing_shards_name_pattern_and_command(tmp_path, train_shards, test, pattern, problem):
    write_numbered_shards(tmp_path, ["test_0.bin", "train_1.bin", "train_2.bin"])
    with pytest.raises(ShardError) as error:
        open_streams("train_*.bin", test, train_shards, 256, REBUILD, tmp_path)
    assert str(error.value) == f"{tmp_path / pattern}: {problem}; rebuild with: {REBUILD}"


def test_no_training_shards_wanted(tmp_path):
    with pytest.raises(ValueError, match="train_shards is 0: use at least 1"):
        open_streams("train_*.bin", "test_*.bin", 0, 256, REBUILD, tmp_path)
