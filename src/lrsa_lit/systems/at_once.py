"""How much of the attention to a prompt is in memory at a time."""

from __future__ import annotations

from torch import Tensor

_PROBABILITIES = 1 << 26


def queries_at_once(query: Tensor, keys: int) -> int:
    """How many of the queries (B, H, G, N, D) may have their probabilities of all keys in memory at a time.

    Fewer parts cost the host less.
    """
    return max(1, _PROBABILITIES // (query.shape[:3].numel() * keys))
