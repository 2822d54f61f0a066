"""The selectors that the fused kernels know, as numbers: compiled layers hand over a tensor, not an object."""

from __future__ import annotations

from lrsa_lit.ops.sparse_attention.compressors import Compressor, KeyDiff, LagRelativeTail, SpreadSelector
from lrsa_lit.ops.sparse_attention.query_selectors import QueryAttention, QueryRuns

KEY_DIFF = -1.0
QUERIES = -2.0


def kernel_code(compressor: Compressor, top_k: int) -> tuple[float, ...] | None:
    """What a selector does at a K, in numbers; None if it selects in PyTorch, as a subclass of one of these may.

    Weights of the key and the value score, and, if some of K are always the last tokens, how many. Or a family, which
    is negative, and a 0, or the arguments of :class:`QueryRuns`.
    """
    if isinstance(compressor, SpreadSelector):
        return compressor.weights
    if type(compressor) is LagRelativeTail:
        return 1.0, compressor.value_weight, compressor.last(top_k)
    if isinstance(compressor, QueryAttention) and type(compressor) in (QueryAttention, QueryRuns):
        size = compressor.size if isinstance(compressor, QueryRuns) else 1
        return QUERIES, compressor.window, compressor.kernel, compressor.shared_heads, size
    return (KEY_DIFF, 0.0) if type(compressor) is KeyDiff else None
