"""Compressors, which decide what of a matrix is sent.

Build one, or give its spec, such as "rank:0.15:natural", to `w2s` or `s2w` of an optimizer
(`from_spec`). Most take a value format (`ef21_muon.values`) for the numbers that they send.

    spec                class               what is sent
    identity            Identity            every entry, in float32
    quantize:normal2    Quantize            every entry, in a value format
    rank:0.15           RankK               a projection of 15% of the rank, as two factors
    quantized_rank:0.15 QuantizedRank       the same in coarse formats, fitted by least squares
    topk:0.05           TopK                the 5% of entries of largest magnitude
    randk:0.05          RandK               5% of entries at random positions
    chunk_topk:64:64    ChunkTopK           the 64 largest entries of every 64 x 64 chunk
    top_columns:0.1     TopColumns          the 10% of columns of largest norm
    top_singular:0.1    TopSingular         the largest singular triplets, 10% of the rank
    bernoulli:0.5:...   Bernoulli           another compressor's message, with probability 0.5
    scaled:0.8:...      Scaled              another compressor's message, times 0.8

`Compressor` is the base class of compressors of your own.
"""

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
