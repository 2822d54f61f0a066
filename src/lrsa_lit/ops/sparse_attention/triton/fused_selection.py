"""Selection by kernels for selectors with a code: a score kernel per family, then a common ranking kernel.

Dimensions: B batch, H key-value heads, Hq query heads, G query heads per key-value head, T tokens, P partitions, D
head_dim, w window.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lrsa_lit.ops.sparse_attention.kernel_code import KEY_DIFF, QUERIES
from lrsa_lit.ops.sparse_attention.query_selectors import QueryRuns
from lrsa_lit.ops.sparse_attention.triton.key_diff_kernel import key_diff_scores
from lrsa_lit.ops.sparse_attention.triton.query_score_kernel import attention_received
from lrsa_lit.ops.sparse_attention.triton.rank_kernel import rank_highest
from lrsa_lit.ops.sparse_attention.triton.select_kernels import select_ranks
from lrsa_lit.ops.sparse_attention.triton.work_tables import Geometry, window_rows


def fused_ranks(
    code: Sequence[float], query: Tensor | None, key: Tensor, value: Tensor, geometry: Geometry,
    ranks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Ranks and scores by the selector of a ``kernel_code``, in the form of ``select_ranks``.

    Some selectors need queries: either all those of the last Tq tokens, (B, Hq, Tq, D), or only the windows,
    (B, H, G, P, w, D).
    """
    if code[0] >= 0:
        first, second, *last = code
        return select_ranks(key, value, geometry, (first, second), ranks, *map(int, last))
    if code[0] == KEY_DIFF:
        scores = key_diff_scores(key, geometry)
    else:
        assert code[0] == QUERIES
        # Without partitions, queries may be missing.
        query = key if query is None else query
        window, kernel, shared_heads, size = map(int, code[1:])
        scores = _query_scores(query, key, geometry, QueryRuns(window, kernel, bool(shared_heads), size))
    return rank_highest(scores, geometry.keep, ranks), scores


def _query_scores(query: Tensor, key: Tensor, geometry: Geometry, selector: QueryRuns) -> Tensor:
    """The selector's scores (B, H, P, L); PyTorch computes them from the received attention, which is small."""
    window = selector.window
    if query.ndim == 6:
        first_rows = torch.arange(query.shape[3], dtype=torch.int32, device=query.device) * window
        query = query.flatten(3, 4).flatten(1, 2)
    else:
        first_rows = window_rows(geometry, query.device, window)
    return selector.pooled(attention_received(query, key, geometry, window, first_rows))
