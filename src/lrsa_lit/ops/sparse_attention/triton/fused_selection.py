"""Selection by the kernels, for every selector that has a code: scores of its family, then one ranking for all."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lrsa_lit.ops.sparse_attention.kernel_code import KEY_DIFF
from lrsa_lit.ops.sparse_attention.triton.key_diff_kernel import key_diff_scores
from lrsa_lit.ops.sparse_attention.triton.rank_kernel import rank_highest
from lrsa_lit.ops.sparse_attention.triton.select_kernels import select_ranks
from lrsa_lit.ops.sparse_attention.triton.work_tables import Geometry


def fused_ranks(
    code: Sequence[float], key: Tensor, value: Tensor, geometry: Geometry, ranks: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Ranks and scores, as ``select_ranks`` returns them, by the selector of a ``kernel_code``."""
    if code[0] == KEY_DIFF:
        scores = key_diff_scores(key, geometry)
        return rank_highest(scores, geometry.keep, ranks), scores
    first, second, *last = code
    return select_ranks(key, value, geometry, (first, second), ranks, *map(int, last))
