"""Causal attention, and how much of it each key receives.

Dimensions: B batch, H key-value heads, G query heads of each, N queries, M keys, D head_dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lrsa_lit.systems.at_once import queries_at_once


def attention_and_sums(
    query: Tensor, key: Tensor, value: Tensor, scale: float, weights: Tensor
) -> tuple[Tensor, Tensor]:
    """Causal attention of the last N of M positions, and the attention that each key received.

    Args:
        query: (B, H, G, N, D).
        key: (B, H, M, D).
        value: (B, H, M, D).
        scale: factor of the attention logits.
        weights: (N,), the weight of each query in the sums.

    Returns:
        (B, H, G, N, D), and weighted sums of probabilities over queries (B, H, G, M), at least float32, detached.
    """
    count, keys = query.shape[3], key.shape[2]
    exact = torch.promote_types(query.dtype, torch.float32)
    rows = queries_at_once(query, keys)
    places = torch.arange(keys, device=key.device)
    outputs, sums = [], torch.zeros(*query.shape[:3], keys, dtype=exact, device=key.device)
    across = key.to(exact).transpose(2, 3)
    for start in range(0, count, rows):
        some = query[:, :, :, start : start + rows].to(exact)
        logits = (some.flatten(2, 3) @ across).unflatten(2, some.shape[2:4]) * scale
        hidden = places > places[keys - count + start : keys - count + start + rows, None]
        shares = logits.masked_fill(hidden, float("-inf")).softmax(dim=-1)
        sums += torch.einsum("n,bhgnm->bhgm", weights[start : start + rows].to(exact), shares.detach())
        outputs.append((shares.to(value.dtype).flatten(2, 3) @ value).unflatten(2, some.shape[2:4]))
    return torch.cat(outputs, dim=3), sums
