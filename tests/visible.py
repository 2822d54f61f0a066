"""What the operator shows each query, read from its weights of one-hot values."""

from __future__ import annotations

import torch
from torch import Tensor

from lrsa_lit.ops.sparse_attention import Rule, select, sparse_attention


def visible_keys(key: Tensor, value: Tensor, rule: Rule, cu_seqlens: Tensor | None = None) -> Tensor:
    """Which keys each query sees: bool (B, H, T queries, T keys)."""
    kept = select(key, value, rule, cu_seqlens=cu_seqlens)
    alike = torch.zeros(*key.shape[:3], key.shape[2])
    one_hot = torch.eye(key.shape[2]).expand_as(alike)
    return sparse_attention(alike, alike, one_hot, rule, cu_seqlens=cu_seqlens, selection=kept) > 0
