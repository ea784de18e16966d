"""Orthonormal bases by Gram matrices, as on a GPU, against torch's QR."""

import pytest
import torch

from ef21_muon.compressors import QuantizedRank, low_rank
from ef21_muon.compressors.low_rank import by_gram, orthonormal
from ef21_muon.norms.newton_schulz import unit_largest


def matrices(m, r, smallest, seed=0):
    """(2, m, r) with singular values from 1 down to `smallest`, evenly in their logarithms."""
    generator = torch.Generator().manual_seed(seed)
    left = torch.linalg.qr(torch.randn(2, m, r, generator=generator, dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(2, r, r, generator=generator, dtype=torch.float64)).Q
    values = torch.logspace(0, torch.tensor(smallest).log10().item(), r, dtype=torch.float64)
    return unit_largest((left * values @ right).float())


def projected(basis, x):
    return basis.double() @ (basis.double().mT @ x)


@pytest.mark.parametrize("smallest", [1.0, 1e-2, 1e-4])
@pytest.mark.parametrize("m, r", [(40, 12), (300, 90), (64, 64), (50, 1)])
def test_it_spans_what_qr_spans(m, r, smallest):
    x = matrices(m, r, smallest)
    found, expected = by_gram(x), torch.linalg.qr(x).Q
    gram = found.mT @ found
    assert (gram - torch.eye(r)).abs().max() < 2e-5
    others = torch.randn(2, m, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    difference = projected(found, others) - projected(expected, others)
    # Either has turned by rounding, over the smallest singular value.
    assert torch.linalg.norm(difference) < 3e-5 / smallest * torch.linalg.norm(others)


@pytest.mark.parametrize(
    "x",
    [
        torch.zeros(2, 30, 5),
        torch.ones(2, 30, 5),
        matrices(30, 5, 1e-9),
        torch.eye(30)[None, :, [0, 1, 0, 1, 2]],
    ],
    ids=["zeros", "one direction", "nothing in the last", "twice the same"],
)
def test_where_directions_are_missing_it_is_at_most_a_projection(x):
    """No direction is longer than 1, and the span is kept."""
    found = by_gram(x)
    assert found.isfinite().all()
    assert torch.linalg.matrix_norm(found, 2).max() < 1 + 1e-5
    rest = x.double() - projected(found, x.double())
    assert torch.linalg.norm(rest) <= 1e-4 * torch.linalg.norm(x)


def few_large_rows(m, n, seed=0):
    """As an embedding's gradient is: (1, m, n), of a few tokens large, small of most."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1, m, n, generator=generator)
    x[:, 2:] *= 1e-3
    return x


def row_after_row(x):
    """Inner products in float32 as a GPU may sum them: into one sum, in the order of the rows."""
    total = x.new_zeros(len(x), x.shape[2], x.shape[2])
    for row in x.unbind(1):
        total += row[:, :, None] * row[:, None, :]
    return total


def test_rounding_of_long_columns_leaves_a_basis(monkeypatch):
    """Whose Gram matrix has eigenvalues below zero then, by more than a shift of 1e-5."""
    generator = torch.Generator().manual_seed(1)
    x = few_large_rows(4000, 64)
    sketch = unit_largest(x @ (x.mT @ torch.randn(1, 4000, 48, generator=generator)))
    summed = row_after_row(sketch)
    lowest = torch.linalg.eigvalsh(summed.double()).min()
    assert lowest < -1.5e-5 * summed.diagonal(dim1=1, dim2=2).max()

    monkeypatch.setattr(low_rank, "gram", row_after_row)
    found = by_gram(sketch)
    assert found.isfinite().all()
    assert torch.linalg.matrix_norm(found, 2).max() < 1 + 1e-4
    rest = x.double() - projected(found, x.double())
    best = torch.linalg.svdvals(x.double())[0, 2:].norm()  # what two directions leave
    assert torch.linalg.norm(rest) < best


@pytest.mark.cuda
def test_an_embeddings_gradient_on_a_gpu():
    x = few_large_rows(50_304, 768).cuda()
    generator = torch.Generator("cuda").manual_seed(0)
    compressor = QuantizedRank(0.3)
    sent = compressor.decode(compressor.encode(x, generator), 50_304, 768)
    assert sent.isfinite().all()
    assert (x - sent).norm() < 0.5 * x.norm()


def test_what_is_not_finite_stays_so():
    x = matrices(20, 4, 0.1)
    x[1, 3, 2] = float("nan")
    assert by_gram(x)[0].isfinite().all()
    assert by_gram(x)[1].isnan().any()


def test_on_the_cpu_it_is_qr():
    x = matrices(20, 4, 0.1)
    assert torch.equal(orthonormal(x), torch.linalg.qr(x).Q)
