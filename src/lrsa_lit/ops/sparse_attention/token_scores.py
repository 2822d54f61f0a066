"""A score of each token that travels with its key, as channels, until the token's partition is judged.

So packing, padding, groups of heads, caches and their reordering carry it without knowing of it. Attention is over the
keys without these channels: nothing but memory is paid for, 4 / D of keys and values where they are stored.

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
    """Keys (B, H, T, D) with the scores (B, H, T) of their tokens: (B, H, T, D + 8), in the dtype of the keys.

    A score is two channels, the second being what the first rounds off: of bfloat16, 16 bits are exact.
    """
    both = torch.stack(parts(scores, key.dtype), dim=-1)
    return torch.cat([key, both, both.new_zeros(*both.shape[:-1], CHANNELS - 2)], dim=-1)


def without_scores(key: Tensor) -> Tensor:
    """Compact keys (…, D) among keys that have scores: (…, D + 8)."""
    return pad(key, (0, CHANNELS))


def scores_of(key: Tensor) -> Tensor:
    """The scores (…) of keys (…, D + 8), at least float32."""
    dtype = torch.promote_types(key.dtype, torch.float32)
    return key[..., -CHANNELS:].to(dtype).sum(dim=-1)


def bare_keys(key: Tensor, value: Tensor, compressor: Compressor) -> Tensor:
    """Keys (…, D) without the scores that a compressor takes, if it takes any; a view.

    Raises:
        UserError: it takes scores, and the keys have none.
    """
    if not compressor.takes_scores:
        return key
    if key.shape[-1] != value.shape[-1] + CHANNELS:
        reason = f"have no scores of their tokens, which {type(compressor).__name__} needs"
        raise UserError("key", reason=reason, hint="a model that LRSA is enabled on adds them, and so does with_scores")
    return narrow(key)
