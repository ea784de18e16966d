"""Compressors: what of a matrix is sent, as objects or by specs such as "rank:0.15:natural"."""

from ef21_muon.compressors.base import Compressor, Identity, Quantize
from ef21_muon.compressors.low_rank import QuantizedRank, RankK
from ef21_muon.compressors.rare import Bernoulli, Scaled, TopColumns, TopSingular
from ef21_muon.compressors.sparse import ChunkTopK, RandK, TopK
from ef21_muon.compressors.specs import from_spec

__all__ = [
    "Bernoulli",
    "ChunkTopK",
    "Compressor",
    "Identity",
    "Quantize",
    "QuantizedRank",
    "RandK",
    "RankK",
    "Scaled",
    "TopColumns",
    "TopK",
    "TopSingular",
    "from_spec",
]
