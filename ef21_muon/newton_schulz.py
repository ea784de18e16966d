"""The orthogonal polar factor of matrices by the Newton-Schulz iteration."""

import torch
from torch import Tensor

# Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024): the quintic whose
# five-fold composition takes singular values in [0.003, 1] to roughly [0.7, 1.2].
JORDAN = (3.4445, -4.7750, 2.0315)


def newton_schulz(matrices: Tensor, steps: int = 5, dtype: torch.dtype | None = None) -> Tensor:
    """U V^T, approximately, for every matrix U S V^T of a batch.

    matrices: (..., m, n); the result has the same shape and dtype. Singular values come out in
    about [0.7, 1.2] where the input's exceeded 0.003 of its Frobenius norm; smaller ones come out
    smaller, and zero stays zero. `dtype` is the dtype of the iteration: by default bfloat16 on CUDA
    and float32 elsewhere (bfloat16 matrix products are ~50x slower on CPUs without bf16 units).
    """
    if dtype is None:
        dtype = torch.bfloat16 if matrices.is_cuda else torch.float32
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = unit_frobenius(matrices.mT if tall else matrices).to(dtype)
    shape = x.shape
    x = x.reshape(-1, *shape[-2:])
    a, b, c = JORDAN
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    x = x.view(shape)
    return (x.mT if tall else x).to(matrices.dtype)


def unit_frobenius(matrices: Tensor) -> Tensor:
    """Matrices (..., m, n) scaled to Frobenius norm 1, without overflow; zero stays zero."""
    scaled = unit_largest(matrices)
    return scaled / torch.linalg.matrix_norm(scaled, keepdim=True).clamp_min(1e-30)


def unit_largest(matrices: Tensor) -> Tensor:
    """Matrices (..., m, n) scaled to a largest magnitude of 1, so that squares stay in range."""
    largest = matrices.abs().amax((-2, -1), keepdim=True)
    return matrices / largest.masked_fill(largest == 0, 1)
