"""Functions of matrices to minimise, and matrices to evaluate them at."""

import numpy as np
import torch
from hypothesis import strategies as st

matrices = st.integers(0, 10**6).map(
    lambda seed: np.random.default_rng(seed).normal(size=(2, 3, 4))
)


def problem(kind, m=3, k=4):
    random = torch.Generator().manual_seed(0)
    targets = torch.randn(3, m, k, generator=random, dtype=torch.float64)
    return kind(torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64), targets)
