"""A score per token that travels with its key, in extra channels, until the token's partition is scored.

So packing, padding, groups of heads, caches and their reordering carry the scores without special code. Attention uses
the keys without these channels, so the only cost is memory: 4 / D of the stored keys and values.

Dimensions: B batch, H key-value heads, T tokens, D head_dim.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from lrsa_lit.errors import UserError
from lrsa_lit.ops.sparse_attention.compressors import Compressor
from lrsa_lit.ops.sparse_attention.slot_bias import CHANNELS, narrow, parts


def with_scores(key: Tensor, scores: Tensor) -> Tensor:
    """Add the scores (B, H, T) of tokens to their keys (B, H, T, D): (B, H, T, D + 8), in the dtype of the keys.

    A score takes two channels, the second of which holds the rounding error of the first: 16 exact bits in bfloat16.
    """
    both = torch.stack(parts(scores, key.dtype), dim=-1)
    return torch.cat([key, both, both.new_zeros(*both.shape[:-1], CHANNELS - 2)], dim=-1)


def without_scores(key: Tensor) -> Tensor:
    """Pad compact keys (…, D), whose scores are no longer needed, to the width of keys with scores: (…, D + 8)."""
    return pad(key, (0, CHANNELS))


def scores_of(key: Tensor) -> Tensor:
    """The scores (…) of keys (…, D + 8), at least float32."""
    dtype = torch.promote_types(key.dtype, torch.float32)
    return key[..., -CHANNELS:].to(dtype).sum(dim=-1)


def bare_keys(key: Tensor, value: Tensor, compressor: Compressor) -> Tensor:
    """Keys (…, D) without the scores, if the compressor takes scores; a view.

    Raises:
        UserError: the compressor takes scores, but the keys have none.
    """
    if not compressor.takes_scores:
        return key
    if key.shape[-1] != value.shape[-1] + CHANNELS:
        reason = f"has no token scores, which {type(compressor).__name__} needs"
        raise UserError("key", reason=reason, hint="with_scores adds them; models with LRSA enabled do so themselves")
    return narrow(key)
