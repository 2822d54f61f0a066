"""One-shot selection by scores of the keys alone, by position, or at random.

Dimensions: B batch, H key-value heads, T tokens of the prompt, D head_dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from lrsa_lit.bounds import check_integers, check_setting, is_integer
from lrsa_lit.ops.sparse_attention.scoring import token_hash
from lrsa_lit.systems.one_shot import OneShot, Prompt


@dataclass(frozen=True)
class KeyNorm(OneShot):
    """Keep the keys with the smallest norms (Devoto et al., arXiv 2406.11430)."""

    def scores(self, prompt: Prompt) -> Tensor:
        """Minus the norm."""
        norms: Tensor = prompt.key.to(torch.promote_types(prompt.key.dtype, torch.float32)).norm(dim=-1)
        return -norms


@dataclass(frozen=True)
class StreamingLLM(OneShot):
    """Keep the first tokens and the last ones (arXiv 2309.17453), at their original positions.

    Args:
        sink_size: how many first tokens to keep. If fewer pairs are kept in all, these are the first ones.
    """

    sink_size: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integers(self, 0, "sink_size")

    def scores(self, prompt: Prompt) -> Tensor:
        """The position; sinks have the highest score."""
        places = torch.arange(prompt.tokens, dtype=torch.float64, device=prompt.key.device)
        places[: self.sink_size] = prompt.tokens
        return places.expand(prompt.key.shape[:3])


@dataclass(frozen=True)
class Random(OneShot):
    """Keep random pairs, the same on every device and in every batch: a hash of seed, layer, head and token.

    Args:
        seed: an integer.
    """

    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_setting("seed", self.seed, is_integer(self.seed), "an integer")

    def scores(self, prompt: Prompt) -> Tensor:
        """Uniform in [0, 1), the same for every row of a layer."""
        batch, heads, tokens, _ = prompt.key.shape
        head, token = (torch.arange(count, device=prompt.key.device) for count in (heads, tokens))
        seeds = (self.seed * 1_000_003 + layer for layer in prompt.layers)
        of_layers = torch.stack([token_hash(seed, head[:, None], token) for seed in seeds])
        return of_layers[:, None].expand(-1, batch // len(of_layers), -1, -1).flatten(0, 1)


@dataclass(frozen=True)
class KeyDiff(OneShot):
    """Keep the keys that are least similar to the others of the prompt (arXiv 2504.15364), as kvpress's KeyDiffPress.

    :class:`KeyDiffBlocks` follows the paper. The compressor KeyDiff chooses within each partition instead.
    """

    def scores(self, prompt: Prompt) -> Tensor:
        """The scores of :func:`unlikeness`."""
        return unlikeness(prompt.key)


def unlikeness(key: Tensor) -> Tensor:
    """Minus the cosine of a key (…, T, D) and the mean of all keys scaled to length 1: (…, T), at least float32."""
    unit = normalize(key.to(torch.promote_types(key.dtype, torch.float32)), dim=-1)
    return -cosine_similarity(unit, unit.mean(dim=-2, keepdim=True), dim=-1)
