"""Torch's fused attention for lengths that differ from call to call."""

from __future__ import annotations

from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

_WITHOUT_PLANS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: Tensor | None = None,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Attend with any backend of torch except cuDNN.

    On Hopper and later GPUs, torch prefers cuDNN, which builds a plan for each new shape; that takes up to half a
    second. A decoded token has one key more than the token before it, and streams that keep different numbers of
    pairs never share a shape.

    Args:
        query: (B, H, N, D).
        key: (B, H, M, D); fewer heads with ``enable_gqa``.
        value: (B, H, M, Dv), likewise.
        mask: bool, broadcastable to (B, H, N, M): the keys that each query sees; None for all.
        scale: factor of the scores before the softmax; 1 / sqrt(D) by default.
        enable_gqa: whether groups of query heads share a key-value head.

    Returns:
        (B, H, N, Dv).
    """
    with sdpa_kernel(_WITHOUT_PLANS):
        output: Tensor = scaled_dot_product_attention(
            query, key, value, attn_mask=mask, scale=scale, enable_gqa=enable_gqa
        )
    return output
