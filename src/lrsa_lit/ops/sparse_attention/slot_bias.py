"""A bias on the logits of compact pairs, stored in extra channels, so that attention and kernels need no change.

Queries and keys get extra channels whose product is the bias divided by the scale; it is 0 for keys without a bias.
Each number takes two channels, the second of which holds the rounding error of the first, so that 16-bit dtypes
lose next to nothing.

The cost: keys and values take (D + 8) / D of the memory, and the kernels use the next larger block of channels, which
for D = 64 or 128 means up to twice the multiplications. The kernels for Hopper GPUs do not run, and D = 256 is too
large for the kernels.

Dimensions: D head_dim, K top_k.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import pad

from lrsa_lit.ops.sparse_attention.buffer import Pair

CHANNELS = 8
"""Extra channels. Four are used, but the kernels need multiples of eight."""

Attend = Callable[[Tensor, Tensor, Tensor, float], Tensor]
"""query, key, value and scale -> output."""


def through_channels(attend: Attend, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Run ``attend`` on queries, keys and values with extra channels (…, D + 8), and return its output as (…, D).

    Keys from :func:`with_bias` carry their biases in these channels. The keys that are given here get zeros.
    """
    if scale == 0:
        query, scale = torch.zeros_like(query), 1.0
    unit = torch.full((), 1 / scale, dtype=torch.promote_types(query.dtype, torch.float32), device=query.device)
    first, second = (part.expand(*query.shape[:-1], 2) for part in parts(unit, query.dtype))
    query = pad(torch.cat([query, first, second], dim=-1), (0, CHANNELS - 4))
    key, value = (pad(tokens, (0, CHANNELS)) for tokens in (key, value))
    return narrow(attend(query, key, value, scale))


def narrow(tokens: Tensor) -> Tensor:
    """Remove the extra channels: (…, D + 8) -> (…, D), a view."""
    return tokens[..., :-CHANNELS]


def with_bias(key: Tensor, value: Tensor, bias: Tensor) -> Pair:
    """Add a bias (…, K) to compact keys and values (…, K, D) -> (…, K, D + 8), differentiable in all."""
    both = torch.stack(parts(bias, key.dtype), dim=-1)
    key = pad(torch.cat([key, both, both], dim=-1), (0, CHANNELS - 4))
    return key, pad(value, (0, CHANNELS))


def parts(number: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A number as the sum of two of a lower precision."""
    first = number.to(dtype)
    return first, (number - first).to(dtype)
