"""The selectors that the fused kernels support, as numbers: compiled layers can pass a tensor but not an object."""

from __future__ import annotations

from lrsa_lit.ops.sparse_attention.compressors import Compressor, KeyDiff, LagRelativeTail, SpreadSelector
from lrsa_lit.ops.sparse_attention.query_selectors import QueryAttention, QueryRuns

KEY_DIFF = -1.0
QUERIES = -2.0


def kernel_code(compressor: Compressor, top_k: int) -> tuple[float, ...] | None:
    """A selector with its K as numbers; None if it has no fused kernel and selects in PyTorch, as subclasses may.

    Selectors with the lag-relative score: the weights of the key and the value score, and for
    :class:`LagRelativeTail` the number of last tokens. Others: a negative number for the family, then 0 or the
    arguments of :class:`QueryRuns`.
    """
    if isinstance(compressor, SpreadSelector):
        return compressor.weights
    if type(compressor) is LagRelativeTail:
        return 1.0, compressor.value_weight, compressor.last(top_k)
    if isinstance(compressor, QueryAttention) and type(compressor) in (QueryAttention, QueryRuns):
        size = compressor.size if isinstance(compressor, QueryRuns) else 1
        return QUERIES, compressor.window, compressor.kernel, compressor.shared_heads, size
    return (KEY_DIFF, 0.0) if type(compressor) is KeyDiff else None
