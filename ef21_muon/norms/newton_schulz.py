"""The orthogonal polar factor U V^T of matrices U S V^T, by Newton-Schulz iterations."""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

Polynomial = tuple[float, float, float]  # (a, b, c) of a x + b x^3 + c x^5

# Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024): the quintic whose
# five-fold composition takes singular values in [0.003, 1] to roughly [0.7, 1.2].
JORDAN = (3.4445, -4.7750, 2.0315)

# Amsel et al., "The Polar Express" (arXiv:2505.16932): each quintic is the best for the interval to
# which the steps before it take singular values in [0.001, 1]. As a margin for rounding, all
# but the last are evaluated at x / 1.01, and the input of the first is divided by 1.01 too.
POLAR_EXPRESS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
    (1.875, -1.25, 0.375),
)
SHRUNK_BY = (1.01**2, *6 * (1.01,), 1)
POLYNOMIALS = {  # one for each step; the last is repeated
    "jordan": (JORDAN,),
    "polar_express": tuple(
        (a / s, b / s**3, c / s**5) for (a, b, c), s in zip(POLAR_EXPRESS, SHRUNK_BY, strict=True)
    ),
}

# Where n / m is at least GRAM_ASPECT, GRAM_STEPS steps at a time use the Gram matrix. They need
# float32, since it holds squares of singular values. On a CPU three are 1.1 (n = 2 m) to 2.5 times
# faster than one by one, and err by 2e-5 at most, in units of the result; five err by 4e-4.
GRAM_ASPECT, GRAM_STEPS = 2, 3


def newton_schulz(
    matrices: Tensor, steps: int = 5, dtype: torch.dtype | None = None, method: str = "jordan"
) -> Tensor:
    """Return U V^T, approximately, for every matrix U S V^T of a batch.

    Five steps of "jordan" bring singular values above 0.003 of the Frobenius norm to about
    [0.7, 1.2]. Of "polar_express" five steps bring those above 0.001 to [0.84, 1.13], six to within
    0.007 of 1, and seven to within 2e-5. Smaller singular values come out smaller, and zero stays
    zero.

    Args:
        matrices: floating-point matrices (..., m, n).
        steps: the number of iterations, at least 1; default 5.
        dtype: the dtype of the iteration. None (default) is bfloat16 on CUDA and float32
            elsewhere, since CPUs without bfloat16 units take about 50 times longer in bfloat16.
            In bfloat16 "jordan" rounds where torch.optim.Muon rounds, except for operations that
            torch.compile fuses on CUDA.
        method: "jordan" (default) or "polar_express".

    Returns:
        A tensor of the shape and dtype of `matrices`.

    Example:
        >>> torch.linalg.svdvals(newton_schulz(torch.eye(3), 7, method="polar_express")).round()
        tensor([1., 1., 1.])

    References:
        Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024). Amsel et
        al., "The Polar Express" (arXiv:2505.16932).
    """
    if dtype is None:
        dtype = torch.bfloat16 if matrices.is_cuda else torch.float32
    published = POLYNOMIALS[method]
    polynomials = [published[min(step, len(published) - 1)] for step in range(steps)]
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = unit_length((matrices.mT if tall else matrices).to(dtype))
    m, n = x.shape[-2:]
    through_gram = dtype.itemsize >= 4 and n >= GRAM_ASPECT * m
    run = compiled() if x.is_cuda else iterate
    result = run(x.reshape(-1, m, n), polynomials, GRAM_STEPS if through_gram else 0).view(x.shape)
    return (result.mT if tall else result).to(matrices.dtype)


def iterate(x: Tensor, polynomials: list[Polynomial], gram_steps: int) -> Tensor:
    """Apply one polynomial after another to the singular values of x (L, m, n), m <= n.

    A step is F x with F = a + b x x^T + c (x x^T)^2, and its Gram matrix is F (x x^T) F. With
    `gram_steps` above 0 so many steps at a time take only two products of n columns; with 0 the
    steps go one by one.
    """
    if gram_steps == 0:
        for a, b, c in polynomials:
            gram = x @ x.mT
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
        return x
    for first in range(0, len(polynomials), gram_steps):
        gram = x @ x.mT
        product = factor = _factor(gram, *polynomials[first])
        for polynomial in polynomials[first + 1 : first + gram_steps]:
            gram = factor @ gram @ factor
            factor = _factor(gram, *polynomial)
            product = factor @ product
        x = product @ x
    return x


def _factor(gram: Tensor, a: float, b: float, c: float) -> Tensor:
    """Return F = a + b gram + c gram^2."""
    factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
    factor.diagonal(dim1=1, dim2=2).add_(a)
    return factor


@cache
def compiled(backend: str = "inductor") -> Callable[[Tensor, list[Polynomial], int], Tensor]:
    """Return `iterate`, compiled for up to torch._dynamo.config.recompile_limit (8) shapes."""
    return torch.compile(iterate, dynamic=False, backend=backend)


def unit_length(x: Tensor, dim: int | tuple[int, ...] = (-2, -1)) -> Tensor:
    """Return x divided by its 2-norm along `dim`; squares do not overflow, and zero stays zero."""
    scaled = unit_largest(x, dim)
    return scaled / torch.linalg.vector_norm(scaled, dim=dim, keepdim=True).clamp_min(1e-30)


def length(x: Tensor, dim: int | tuple[int, ...] = (-2, -1)) -> Tensor:
    """Return the 2-norm of x along `dim`; squares do not overflow."""
    power = binade(x, dim)
    norm = torch.linalg.vector_norm(x / power, dim=dim, keepdim=True)
    return (norm * power).squeeze(dim)


def unit_largest(x: Tensor, dim: int | tuple[int, ...] = (-2, -1)) -> Tensor:
    """Return x times the power of two that brings its largest magnitude along `dim` into [1, 2).

    The product is exact.
    """
    return x / binade(x, dim)


def binade(x: Tensor, dim: int | tuple[int, ...] = (-2, -1)) -> Tensor:
    """Return the power of two at or below the largest magnitude along `dim`, or 1 for zeros."""
    largest = x.abs().amax(dim, keepdim=True)
    power = largest / (2 * torch.frexp(largest).mantissa)
    return power.masked_fill(largest == 0, 1)
