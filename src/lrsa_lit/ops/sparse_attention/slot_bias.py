"""A number that is added to the logits of a compact slot, as channels: no attention or kernel has to know of it.

Queries get channels whose product with those of a slot is the bias over the scale; those of other keys are 0. A number
is two of them, the second being what the first rounds off, so that 16 bits lose nothing that counts.

The price is memory of (D + 8) / D in keys and values, and the next larger block of channels in the kernels: up to twice
the products from D = 64 or 128 on, without the kernels for Hopper GPUs; 256 channels are more than the kernels take.

Dimensions: D head_dim, K top_k.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import pad

from lrsa_lit.ops.sparse_attention.buffer import Pair

CHANNELS = 8
"""Appended channels, of which four are used: the kernels take multiples of eight."""

Attend = Callable[[Tensor, Tensor, Tensor, float], Tensor]
"""query, key, value and scale -> output."""


def through_channels(attend: Attend, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Run ``attend`` on queries, keys and values (…, D + 8), whose compact keys may have biases; its output is (…, D).

    It finds biases in the channels of keys that :func:`with_bias` made; the ones given here have none.
    """
    if scale == 0:
        query, scale = torch.zeros_like(query), 1.0
    unit = torch.full((), 1 / scale, dtype=torch.promote_types(query.dtype, torch.float32), device=query.device)
    first, second = (part.expand(*query.shape[:-1], 2) for part in parts(unit, query.dtype))
    query = pad(torch.cat([query, first, second], dim=-1), (0, CHANNELS - 4))
    key, value = (pad(tokens, (0, CHANNELS)) for tokens in (key, value))
    return narrow(attend(query, key, value, scale))


def narrow(tokens: Tensor) -> Tensor:
    """(…, D + 8) -> (…, D), a view."""
    return tokens[..., :-CHANNELS]


def with_bias(key: Tensor, value: Tensor, bias: Tensor) -> Pair:
    """Compact keys and values (…, K, D) with a bias (…, K) on their logits -> (…, K, D + 8), with gradient to all."""
    both = torch.stack(parts(bias, key.dtype), dim=-1)
    key = pad(torch.cat([key, both, both], dim=-1), (0, CHANNELS - 4))
    return key, pad(value, (0, CHANNELS))


def parts(number: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Two numbers of a dtype that add up to a more exact one than it holds."""
    first = number.to(dtype)
    return first, (number - first).to(dtype)
