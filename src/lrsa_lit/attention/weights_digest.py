"""Which model a cache belongs to, told by its weights as they are in memory, wherever they were loaded from."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from torch import Tensor

from lrsa_lit.attention.attached import base_of

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_NOT_OF_KEYS = ("architectures", "dtype", "lrsa", "return_dict", "torch_dtype", "transformers_version", "use_cache")
"""Entries of a config that say nothing about keys and values; a rule is compared by itself."""


@torch.no_grad()
def weights_digest(model: Any) -> str:
    """SHA-256 over a model's config and the sums of the bit patterns of each row of its weights.

    Sums of integers are the same in any order and on any device, and take as long as reading the weights once. Weights
    of another dtype are another model: their keys and values differ.

    Args:
        model: a causal language model, in a peft wrapper or not.
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
    """Sums (rows,) of the bit patterns, which wrap around; of a vector the patterns themselves."""
    bits = weight.detach().contiguous().view(_BITS[weight.element_size()])
    return bits.flatten(0, -2).sum(dim=-1, dtype=torch.int64) if bits.ndim > 1 else bits
