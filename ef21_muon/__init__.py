"""EF21-Muon: a communication-efficient, LMO-based optimizer with error feedback.

The optimizer of "Error Feedback for Muon and Friends" (arXiv:2510.00643) as a library that depends
on torch alone.
"""

from ef21_muon.compressors import Compressor, Dense, Identity, RandK, RankK, TopK
from ef21_muon.noneuclidean import Damping, Dropout, TopColumns, TopSingular
from ef21_muon.norms import AdaptiveRadius, Norm, Sign, Spectral
from ef21_muon.optimizer import EF21Muon
from ef21_muon.values import (
    BFloat16,
    Float32,
    Integer,
    Natural,
    NaturalWindow,
    SignScale,
    Values,
)

__all__ = [
    "AdaptiveRadius",
    "BFloat16",
    "Compressor",
    "Damping",
    "Dense",
    "Dropout",
    "EF21Muon",
    "Float32",
    "Identity",
    "Integer",
    "Natural",
    "NaturalWindow",
    "Norm",
    "RandK",
    "RankK",
    "Sign",
    "SignScale",
    "Spectral",
    "TopColumns",
    "TopK",
    "TopSingular",
    "Values",
]
