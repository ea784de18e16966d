"""Norms, which give the server's step its geometry.

The step of a layer is lr radius LMO(G), where the linear minimisation oracle LMO(G) is the matrix
in the unit ball of the layer's norm that minimises <G, Z>. `ef21_muon.param_groups` gives every
role of a parameter its norm; a `norm` entry of a parameter group sets another one.

    Spectral            the step of Muon; with its scalings that of Scion and Moonlight
    Sign                signs, for embeddings and output heads
    ColumnNorm, RowNorm unit columns or rows, for input and output layers
    Euclidean, BiasRMS  normalised gradients, for biases and gains
    Nuclear, L1         one singular pair, or one entry
    Blocks              a norm for each block of a matrix, such as grouped convolutions
    AdaptiveRadius      Gluon's radius, which follows the dual norm of the gradient
    Norm                the base class of norms of your own
"""

from ef21_muon.norms.base import Norm
from ef21_muon.norms.lmo import (
    AdaptiveRadius,
    BiasRMS,
    Blocks,
    ColumnNorm,
    Euclidean,
    RowNorm,
    Sign,
    Spectral,
)
from ef21_muon.norms.rare import L1, Nuclear

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
