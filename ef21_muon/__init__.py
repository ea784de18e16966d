"""EF21-Muon: a communication-efficient, LMO-based optimizer with error feedback.

The optimizer of "Error Feedback for Muon and Friends" (arXiv:2510.00643) as a library that depends
on torch alone.
"""

from ef21_muon.compressors import Compressor, Dense, Identity, RandK, RankK, TopK
from ef21_muon.norms import Norm, Sign, Spectral
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
    "BFloat16",
    "Compressor",
    "Dense",
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
    "TopK",
    "Values",
]
