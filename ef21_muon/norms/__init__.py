"""Norms: their linear minimisation oracles (LMOs) are the steps, and presets of who has which."""

from ef21_muon.norms.base import Norm
from ef21_muon.norms.lmo import (
    L1,
    AdaptiveRadius,
    BiasRMS,
    Blocks,
    ColumnNorm,
    Euclidean,
    Nuclear,
    RowNorm,
    Sign,
    Spectral,
)

__all__ = [
    "L1",
    "AdaptiveRadius",
    "BiasRMS",
    "Blocks",
    "ColumnNorm",
    "Euclidean",
    "Norm",
    "Nuclear",
    "RowNorm",
    "Sign",
    "Spectral",
]
