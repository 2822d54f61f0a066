"""Truncated singular value decompositions, and LoRC's ranks per layer (arXiv 2410.03111).

Dimensions: d width of the hidden states, w width of the factored matrix, r its rank.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lrsa_lit.attention.low_rank_linear import Factors

RIDGE = 1e-6
"""Added to the diagonal of the moments, as a share of its mean, because inputs may not span all directions."""
_ZERO = 1e-6
"""Singular values below this share of the largest one are left out of condition numbers."""


def factors_of(weight: Tensor, rank: int, moments: Tensor | None = None, ridge: float = RIDGE) -> Factors:
    """The best A (d, r) and B (r, w) with A B ≈ W (d, w), or, given the inputs' moments, with x A B ≈ x W.

    Without moments, U S V^T = W, A = U_r and B = S_r V_r^T. With moments, C + ridge tr(C) / d = R R^T, U S V^T = R^T W
    and A = R^-T U_r (arXiv 2403.07378). The largest entry of each column of A is positive.

    Args:
        weight: (d, w) float64.
        rank: r, at most min(d, w).
        moments: (d, d) float64, the mean of x^T x over inputs x (1, d).
        ridge: the number to add to the diagonal of the moments, as a share of its mean.
    """
    root = None
    if moments is not None:
        small = ridge * moments.diagonal().mean().clamp(min=1e-30)
        root = torch.linalg.cholesky(moments + small * torch.eye(len(moments), dtype=moments.dtype, device="cpu"))
    left, sizes, right = torch.linalg.svd(weight if root is None else root.T @ weight, full_matrices=False)
    left, right = left[:, :rank], sizes[:rank, None] * right[:rank]
    if root is not None:
        left = torch.linalg.solve_triangular(root.T, left, upper=True)
    signs = left.gather(0, left.abs().argmax(dim=0, keepdim=True)).sign()
    return left * signs, right * signs.T


def log_condition(weight: Tensor) -> float:
    """Logarithm of a matrix's condition number, without singular values that are zero."""
    sizes = torch.linalg.svdvals(weight.double())
    kept = sizes[sizes > _ZERO * sizes[0]]
    return float((kept[0] / kept[-1]).log()) if len(kept) else 0.0


def progressive(log_conditions: Sequence[float], d_max: float, d_min: float) -> list[float]:
    """LoRC's rank of each layer before rounding, from d_max in the first layer to d_min in the last.

    Ranks decrease with the logarithm of the product of a layer's own and all deeper condition numbers. The product
    itself would overflow float64 in a large model.

    Args:
        log_conditions: for each layer, the log condition number of W_k plus that of W_v.
        d_max: rank of the first layer.
        d_min: rank of the last layer.
    """
    sums = list(itertools.accumulate(reversed(log_conditions)))[::-1]
    span = max(sums) - min(sums)
    if span == 0:
        return [d_max] * len(sums)
    return [d_max * (1 - (max(sums) - each) / span * (1 - d_min / d_max)) for each in sums]


def progressive_ranks(log_conditions: Sequence[float], total: int, width: int, min_share: float) -> list[int]:
    """Ranks from 1 to ``width`` that decrease as in :func:`progressive` and sum to ``total``.

    The first layer's rank is found by bisection; the last is ``min_share`` of it. The rest from rounding is added to,
    or taken from, the deepest layers that have room. If the first rank would exceed the width, deeper layers get more.
    """

    def ranks(d_max: float) -> list[int]:
        return [rounded(each, width) for each in progressive(log_conditions, d_max, min_share * d_max)]

    low, high = 0.0, width / min_share
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(ranks(middle)) < total else (low, middle)
    found = ranks(high)
    while (left := total - sum(found)) != 0:
        step = 1 if left > 0 else -1
        for layer in reversed(range(len(found))):
            if left and 1 <= found[layer] + step <= width:
                found[layer], left = found[layer] + step, left - step
    return found


def rounded(rank: float, width: int) -> int:
    """The nearest whole rank, halves upwards, from 1 to ``width``."""
    return min(max(math.floor(rank + 0.5), 1), width)
