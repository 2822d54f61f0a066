"""Identify the model of a cache by its weights in memory, independent of where they were loaded from."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from torch import Tensor

from lrsa_lit.attention.attached import base_of

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_NOT_OF_KEYS = ("architectures", "dtype", "lrsa", "return_dict", "torch_dtype", "transformers_version", "use_cache")
"""Config entries that do not affect keys and values, and the rule, which is compared separately."""


@torch.no_grad()
def weights_digest(model: Any) -> str:
    """SHA-256 of a model's config and of the summed bit patterns of each row of its weights.

    Integer sums are the same in any order and on any device, and take one pass over the weights. Weights in another
    dtype give another digest, because their keys and values differ.

    Args:
        model: a causal language model, with or without a peft wrapper.
    """
    inner = base_of(model)
    config = {
        name: value
        for name, value in inner.config.to_dict().items()
        if not name.startswith(("_", "output_")) and name not in _NOT_OF_KEYS and not name.endswith("_token_id")
    }
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, weight in sorted(inner.state_dict().items()):
        digest.update(json.dumps([name, str(weight.dtype), list(weight.shape)]).encode())
        digest.update(_sums(weight).cpu().numpy().tobytes())
    return digest.hexdigest()


def _sums(weight: Tensor) -> Tensor:
    """Sums (rows,) of the bit patterns, modulo 2 ** 64; a vector is returned as its bit patterns."""
    bits = weight.detach().contiguous().view(_BITS[weight.element_size()])
    return bits.flatten(0, -2).sum(dim=-1, dtype=torch.int64) if bits.ndim > 1 else bits
