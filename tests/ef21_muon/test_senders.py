"""Which entries a message has, and the mean over those who sent an entry."""

import pytest
import torch
from host_sync import NoHostSync
from hypothesis import given, settings
from hypothesis import strategies as st
from matrices import ALWAYS_THE_SAME, batches, seeded
from run import PATIENCE
from torch import nn

from ef21_muon import LocalSteps
from ef21_muon.compressors import (
    Bernoulli,
    ChunkTopK,
    Identity,
    Quantize,
    QuantizedRank,
    RandK,
    RankK,
    Scaled,
    TopColumns,
    TopK,
    TopSingular,
)
from ef21_muon.compressors.base import Compressor
from ef21_muon.compressors.sparse import Fraction

FORMATS = ("float32", "natural", "int4", "sign", "statistical2")
WHOLE = (
    *(Identity(), Quantize("normal2"), RankK(0.3), TopSingular(0.3), QuantizedRank(0.3)),
    Scaled(Quantize("int4")),
)
SPARSE = [
    (kind, made(values))
    for values in FORMATS
    for kind, made in (
        ("top", lambda values: TopK(0.2, values)),
        ("top all", lambda values: TopK(1.0, values)),
        ("random", lambda values: RandK(0.3, values)),
        ("chunks", lambda values: ChunkTopK(5, 6, values)),
        ("columns", lambda values: TopColumns(0.3, values)),
    )
]
SPARSE += [
    ("scaled", Scaled(TopK(0.2), 0.5)),
    ("dropped", Bernoulli(TopK(0.2), 0.5)),
    ("dropped", Bernoulli(Quantize("natural"), 0.5)),
]


def how_many(kind: str, compressor: Compressor, m: int, n: int) -> int | None:
    """Entries of every message, where that is known."""
    if kind in ("top", "top all", "random"):
        return compressor.kept(m * n)
    if kind == "columns":
        return m * compressor.kept(n)
    if kind == "chunks":
        places = compressor._places(m, n)
        return places.count * places.k
    return None


@pytest.mark.parametrize(("kind", "compressor"), SPARSE, ids=[f"{k} {c}" for k, c in SPARSE])
@settings(ALWAYS_THE_SAME, max_examples=5)
@given(x=batches(), seed=st.integers(0, 99))
def test_what_was_not_sent_is_zero_and_as_many_are_sent_of_any_matrix(kind, compressor, x, seed):
    """Also of a zero matrix, and where values are rounded to zero."""
    m, n = x.shape[1:]
    payload = compressor.encode(x, seeded(seed))
    sent = compressor.sent(payload, m, n)
    assert sent.dtype == torch.bool and sent.shape == x.shape
    assert not compressor.decode(payload, m, n)[~sent].any()
    count = how_many(kind, compressor, m, n)
    assert count is None or sent.sum((1, 2)).eq(count).all()
    if kind == "dropped":
        assert torch.equal(sent.any(2).any(1), payload[:, 0] != 0)


@pytest.mark.parametrize("compressor", WHOLE, ids=str)
def test_what_sends_all_entries_says_so(compressor):
    payload = compressor.encode(torch.randn(2, 9, 11, generator=seeded()), seeded())
    assert compressor.sent(payload, 9, 11) is None


def of_layers(**options) -> LocalSteps:
    model = nn.Linear(24, 16, bias=False)
    return LocalSteps(torch.optim.SGD(model.parameters(), lr=0.1), mean="senders", **options)


def mean_of(optimizer: LocalSteps, compressor: Compressor, messages: list) -> torch.Tensor:
    (batch,) = optimizer.batches
    batch.up.compressor = compressor
    return optimizer._mean(batch, messages)


@pytest.mark.parametrize("workers", [1, 2, 3, 5])
@pytest.mark.parametrize("kind", ["top", "chunks", "random", "columns", "dropped"])
def test_every_entry_is_the_mean_of_those_who_sent_it(kind, workers):
    compressor = dict(SPARSE)[kind]
    shape = 1, 16, 24
    messages = [compressor.encode(torch.randn(shape, generator=seeded(j))) for j in range(workers)]
    found = mean_of(of_layers(), compressor, messages)
    values = [compressor.decode(message, 16, 24) for message in messages]
    marks = [compressor.sent(message, 16, 24) for message in messages]
    for place in torch.cartesian_prod(torch.arange(16), torch.arange(24)).tolist():
        of_place = [v[0][*place] for v, sent in zip(values, marks, strict=True) if sent[0][*place]]
        expected = sum(of_place) / max(1, len(of_place))
        assert found[0][*place] == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize(("kind", "compressor"), SPARSE, ids=[f"{k} {c}" for k, c in SPARSE])
def test_it_does_not_wait_for_the_device(kind, compressor):
    messages = [compressor.encode(torch.randn(1, 16, 24, generator=seeded(j))) for j in range(2)]
    optimizer = of_layers()
    mean_of(optimizer, compressor, messages)  # which may make a table
    with NoHostSync():
        mean_of(optimizer, compressor, messages)


@pytest.mark.parametrize("workers", [1, 2, 3, 7])
@pytest.mark.parametrize("fraction", [1.0, None])
def test_where_all_sent_all_it_is_the_plain_mean(fraction, workers):
    """Of messages that cannot leave anything out bit for bit."""
    compressor = TopK(fraction) if fraction else Quantize("int4")
    messages = [
        compressor.encode(torch.randn(1, 16, 24, generator=seeded(j)), seeded(j))
        for j in range(workers)
    ]
    optimizer = of_layers()
    found = mean_of(optimizer, compressor, messages)
    optimizer.mean = "all"
    plain = mean_of(optimizer, compressor, messages)
    torch.testing.assert_close(found, plain, rtol=0, atol=1e-6 if fraction else 0)


class TopRows(Fraction):
    """A compressor of a user's own, which does not say what it sent."""

    def payload_bytes(self, m, n):
        return 4 * self.kept(m) * n

    def title(self):
        return "top rows"


MUTE = (TopRows(0.25), Scaled(TopRows(0.25), 0.5))


@pytest.mark.parametrize("compressor", MUTE, ids=str)
def test_a_compressor_that_does_not_say_what_it_sent_is_refused_at_once(compressor):
    message = (
        r"mean='senders' is not allowed with w2s=.*top rows.* give its class the method `sent`"
    )
    with pytest.raises(ValueError, match=message) as error:
        of_layers(w2s=compressor)
    assert "\n" not in str(error.value)


def test_it_is_distinguished_from_the_mean_over_all():
    of_all, of_senders = (
        LocalSteps(torch.optim.SGD(nn.Linear(24, 16).parameters(), lr=0.1), mean=mean)
        for mean in ("all", "senders")
    )
    assert of_all._built_as["mean"] == "all" and of_senders._built_as["mean"] == "senders"
    with pytest.raises(ValueError, match=r"the state is of mean 'all' \(here 'senders'\)"):
        of_senders.load_state_dict(of_all.state_dict())


EVERY, LR = 3, 0.1


def largest(x):
    """Of a layer the entries that TopK(0.3) sends."""
    matrix = x.detach().reshape(len(x), -1)
    compressor = TopK(0.3).fit(*matrix.shape)
    return compressor.decode(compressor.encode(matrix[None]), *matrix.shape).view_as(x)


def test_of_workers_that_come_and_go_it_is_over_those_whose_messages_came():
    """Worker 2 leaves after the first round."""
    crew = pytest.importorskip("fleet", exc_type=ImportError)
    options = {"w2s": TopK(0.3), "mean": "senders", "feedback": "none"}
    with crew.lighthouse(2) as url, crew.workers(url, range(3), **options) as workers:
        crew.enter(workers)
        shared = [p.detach().clone() for p in crew.new_model().parameters()]
        for first, numbers in ((0, (0, 1, 2)), (EVERY, (0, 1))):
            threads = [workers[j].start(first + EVERY, joins=first == 0) for j in numbers]
            for thread in threads:
                thread.join(PATIENCE)
            # Who stands still for long enough, on a busy machine, misses a round.
            counted = crew.who_counted(workers)[first // EVERY]
            messages = [steps_of(crew, number, shared, first) for number in counted]
            for w, *of_workers in zip(shared, *messages, strict=True):
                w -= sum(of_workers) / sum(one != 0 for one in of_workers).clamp(min=1)
            for number in numbers:
                found = workers[number].global_params[first + EVERY]
                expected = torch.cat([w.flatten() for w in shared])
                torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
            workers[2].fleet.leave()


def steps_of(crew, number, shared, first):
    """What a worker sends of its steps from W, layer by layer."""
    model = crew.new_model()
    local = [p.data for p in model.parameters()]
    torch._foreach_copy_(local, shared)
    for step in range(first, first + EVERY):
        crew.gradient(model, number, step)
        torch._foreach_add_(local, [-LR * p.grad for p in model.parameters()])
    return [largest(w - x) for w, x in zip(shared, local, strict=True)]
