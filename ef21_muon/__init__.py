"""EF21-Muon: a communication-efficient, LMO-based optimizer with error feedback.

The optimizer of "Error Feedback for Muon and Friends" (arXiv:2510.00643) as a library that depends
on torch alone.
"""

from ef21_muon.averaged import AveragedGradients
from ef21_muon.lmo.norms import (
    L1,
    AdaptiveRadius,
    BiasRMS,
    Blocks,
    ColumnNorm,
    Euclidean,
    Norm,
    Nuclear,
    RowNorm,
    Sign,
    Spectral,
)
from ef21_muon.lmo.presets import param_groups
from ef21_muon.local_steps import LocalSteps
from ef21_muon.messages.compressors import Compressor, Dense, Identity
from ef21_muon.messages.extras import Damping, Dropout, TopColumns, TopSingular
from ef21_muon.messages.levels import Normal, Statistical
from ef21_muon.messages.low_rank import FittedRank, RankK
from ef21_muon.messages.scaled import Integer, NaturalWindow, SignScale, SmoothnessAware
from ef21_muon.messages.sparse import ChunkTopK, RandK, TopK
from ef21_muon.messages.values import BFloat16, Float32, Natural, Values
from ef21_muon.optimizer import EF21Muon
from ef21_muon.transport.fixed import ALONE
from ef21_muon.transport.mesh import WorkerMesh

__version__ = "0.1.0"
__all__ = [
    "ALONE",
    "L1",
    "AdaptiveRadius",
    "AveragedGradients",
    "BFloat16",
    "BiasRMS",
    "Blocks",
    "ChunkTopK",
    "ColumnNorm",
    "Compressor",
    "Damping",
    "Dense",
    "Dropout",
    "EF21Muon",
    "Euclidean",
    "FittedRank",
    "Float32",
    "Identity",
    "Integer",
    "LocalSteps",
    "Natural",
    "NaturalWindow",
    "Norm",
    "Normal",
    "Nuclear",
    "RandK",
    "RankK",
    "RowNorm",
    "Sign",
    "SignScale",
    "SmoothnessAware",
    "Spectral",
    "Statistical",
    "TopColumns",
    "TopK",
    "TopSingular",
    "Values",
    "WorkerMesh",
    "param_groups",
]
