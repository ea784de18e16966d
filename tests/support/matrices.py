"""Matrices to compress, and what compressors lose of them."""

import torch
from hypothesis import settings
from hypothesis import strategies as st

ALWAYS_THE_SAME = settings(derandomize=True)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def matrix(kind, m, n, seed):
    x = torch.randn(m, n, generator=seeded(seed))
    if kind == "zeros":
        x = torch.zeros(m, n)
    if kind == "all equal":
        x = x[:1, :1].expand(m, n).clone()
    if kind == "one huge entry":
        x[seed % m, seed % n] = 1e6
    if kind == "diagonal":
        x = torch.eye(m, n)
    return x


@st.composite
def batches(draw):
    """Float32 (L, m, n)."""
    side = st.integers(1, 40)
    m, n = draw(st.sampled_from([(1, 0), (0, 1), (0, 0)]))
    m, n = m or draw(side), n or draw(side)
    kinds = st.sampled_from(["random", "zeros", "all equal", "one huge entry", "diagonal"])
    seeds = st.integers(0, 2**31)
    members = draw(st.lists(st.tuples(kinds, seeds), min_size=1, max_size=3))
    scale = draw(st.sampled_from([1e-30, 1e-10, 1.0, 1e10, 1e30]))
    return scale * torch.stack([matrix(kind, m, n, seed) for kind, seed in members])


def lost(compressed, x):
    """||C(x) - x||^2 / ||x||^2 for every matrix of a batch; 0 for zero matrices."""
    x, error = x.double(), (compressed.double() - x.double())
    squares = x.square().sum((-2, -1))
    return error.square().sum((-2, -1)) / squares.masked_fill(squares == 0, 1)
