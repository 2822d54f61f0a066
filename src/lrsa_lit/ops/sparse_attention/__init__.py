"""Lag-relative sparse attention as a pure PyTorch operator; see README.md here for the maths."""

from lrsa_lit.ops.sparse_attention.api import Impl, select, sparse_attention, visibility_mask
from lrsa_lit.ops.sparse_attention.compiled_layers import is_traceable, numbers_of, traced_attention
from lrsa_lit.ops.sparse_attention.compressors import (
    ChunkWise,
    Compressor,
    LagRelative,
    MeanPool,
    Partitions,
    RandomTokens,
    Recency,
    Selector,
    SpreadSelector,
    Strided,
    ValueRelative,
)
from lrsa_lit.ops.sparse_attention.config import LRSAConfig
from lrsa_lit.ops.sparse_attention.scoring import Ranking
from lrsa_lit.ops.sparse_attention.selection import Selection

__all__ = [
    "ChunkWise",
    "Compressor",
    "Impl",
    "LRSAConfig",
    "LagRelative",
    "MeanPool",
    "Partitions",
    "RandomTokens",
    "Ranking",
    "Recency",
    "Selection",
    "Selector",
    "SpreadSelector",
    "Strided",
    "ValueRelative",
    "is_traceable",
    "numbers_of",
    "select",
    "sparse_attention",
    "traced_attention",
    "visibility_mask",
]
