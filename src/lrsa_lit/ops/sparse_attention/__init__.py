"""Lag-relative sparse attention as a pure PyTorch operator; see README.md here for the maths."""

from lrsa_lit.ops.sparse_attention.abstract_stream import Stream, fetch_numbers
from lrsa_lit.ops.sparse_attention.api import (
    Choice,
    Impl,
    choice,
    dense_attention,
    implementation,
    is_traceable,
    select,
    sparse_attention,
    traced_attention,
)
from lrsa_lit.ops.sparse_attention.compressors import (
    ChunkWise,
    Compressor,
    KeyDiff,
    LagRelative,
    LagRelativeTail,
    MeanPool,
    Partitions,
    RandomTokens,
    Recency,
    Selector,
    SpreadSelector,
    Strided,
    ValueRelative,
    ValueWeighted,
)
from lrsa_lit.ops.sparse_attention.geometry import (
    attended_pairs,
    checked_boundaries,
    compressed_at,
    most_window_rows,
    raw_start,
    spans,
    stored_queries,
    stored_size,
)
from lrsa_lit.ops.sparse_attention.grouped_stream import GroupedStream
from lrsa_lit.ops.sparse_attention.head_rules import HeadGroups, HeadRules, tensor_of_heads
from lrsa_lit.ops.sparse_attention.query_selectors import QueryAttention, QueryRuns
from lrsa_lit.ops.sparse_attention.rotary import Rotary
from lrsa_lit.ops.sparse_attention.rows_by_length import attend_by_length
from lrsa_lit.ops.sparse_attention.rows_together import attend_together, can_attend_together
from lrsa_lit.ops.sparse_attention.rule import Rule, tensor_of_rule
from lrsa_lit.ops.sparse_attention.scoring import Ranking
from lrsa_lit.ops.sparse_attention.selection import Selection, of_sequence
from lrsa_lit.ops.sparse_attention.shared_heads import SharedHeads
from lrsa_lit.ops.sparse_attention.slot_bias import through_channels
from lrsa_lit.ops.sparse_attention.straight_through import StraightThrough
from lrsa_lit.ops.sparse_attention.stream import Held, KeyValueStream, advance_together
from lrsa_lit.ops.sparse_attention.synthesizers import Centroids, FreqPartition
from lrsa_lit.ops.sparse_attention.token_gate import TokenGate
from lrsa_lit.ops.sparse_attention.token_scores import bare_keys, with_scores

__all__ = [
    "Centroids",
    "Choice",
    "ChunkWise",
    "Compressor",
    "FreqPartition",
    "GroupedStream",
    "HeadGroups",
    "HeadRules",
    "Held",
    "Impl",
    "KeyDiff",
    "KeyValueStream",
    "LagRelative",
    "LagRelativeTail",
    "MeanPool",
    "Partitions",
    "QueryAttention",
    "QueryRuns",
    "RandomTokens",
    "Ranking",
    "Recency",
    "Rotary",
    "Rule",
    "Selection",
    "Selector",
    "SharedHeads",
    "SpreadSelector",
    "StraightThrough",
    "Stream",
    "Strided",
    "TokenGate",
    "ValueRelative",
    "ValueWeighted",
    "advance_together",
    "attend_by_length",
    "attend_together",
    "attended_pairs",
    "bare_keys",
    "can_attend_together",
    "checked_boundaries",
    "choice",
    "compressed_at",
    "dense_attention",
    "fetch_numbers",
    "implementation",
    "is_traceable",
    "most_window_rows",
    "of_sequence",
    "raw_start",
    "select",
    "spans",
    "sparse_attention",
    "stored_queries",
    "stored_size",
    "tensor_of_heads",
    "tensor_of_rule",
    "through_channels",
    "traced_attention",
    "with_scores",
]
