"""Orthonormal bases of what the columns of tall matrices span."""

import torch
from torch import Tensor

PASSES = 3
SHIFT = 1e-5  # of the largest square of a column's length


def orthonormal(x: Tensor) -> Tensor:
    """Columns of length 1, orthogonal to each other, that span those of x (L, m, r), m >= r.

    Of a GPU by Cholesky factors of Gram matrices, X <- X L^-T with L L^T = X^T X + shift, three
    times (Fukaya et al., arXiv:1809.11085): matrix products alone, where Householder's reflections
    take it 30 times as long (48 matrices of 768 x 115 on an H100: 22 ms for 0.7). What x spans with
    less than about 1e-5 of its length comes out shorter than 1, never longer, so that P P^T stays
    at most a projection. Elsewhere by QR. Does not wait for the device.
    """
    return by_gram(x) if x.is_cuda else torch.linalg.qr(x).Q


def by_gram(x: Tensor) -> Tensor:
    """`orthonormal` by Gram matrices, for columns whose squares are in float32's range."""
    for _ in range(PASSES):
        gram = x.mT @ x
        diagonal = gram.diagonal(dim1=-2, dim2=-1)
        largest = diagonal.amax(-1, keepdim=True)
        diagonal.add_(torch.where(largest == 0, 1, SHIFT * largest))
        factor = torch.linalg.cholesky_ex(gram).L
        x = torch.linalg.solve_triangular(factor, x.mT, upper=False).mT
    return x
