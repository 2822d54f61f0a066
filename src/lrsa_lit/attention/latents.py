"""Latents of a layer's keys and values: taken from its hidden states for a cache, and read again.

Dimensions: B batch, N tokens, H key-value heads, D head_dim, G latents of a token (H, or 1 that all heads share), r
channels of a latent.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lrsa_lit.attention.low_rank_linear import LowRankLinear
from lrsa_lit.attention.module_calls import hidden_states
from lrsa_lit.errors import UserError
from lrsa_lit.ops.sparse_attention import Rotary

LATENTS = "lrsa_latents"
"""The keyword that carries the latents of keys and values (B, G, N, r) to the attention of a layer with a cache."""
_REMEDY = "set latents: false"


class LatentReader:
    """Makes keys and values of latents as a layer's attention does: by its own weights, norm and rotation.

    Copies of a cache share it; a cache that is pickled loses it, as it does its model.

    Args:
        module: the attention, with factors of low rank in the place of its projections.
        rotary: the rotation that it gives its keys.
        heads: H.

    Raises:
        UserError: its keys are normalised over all heads together, which heads with latents of their own cannot be, or
            the latents of its heads have different ranks.
    """

    def __init__(self, module: Any, rotary: Rotary, heads: int) -> None:
        self.keys_from: LowRankLinear = module.k_proj
        self.values_from: LowRankLinear = module.v_proj
        self.norm: nn.Module | None = getattr(module, "k_norm", None)
        self.rotary, self.heads, self.head_dim = rotary, heads, self.keys_from.out_features // heads
        self.groups = len(self.keys_from.ranks)
        if any(len(set(layer.ranks)) > 1 for layer in (self.keys_from, self.values_from)):
            reason = "has heads with latents of different ranks, as spectra of each head leave them"
            raise UserError("latents", type(module).__name__, reason=reason, hint=f"{_REMEDY}, or decompose jointly")
        weight = getattr(self.norm, "weight", None)
        self._norm_of_all = weight is not None and weight.numel() == heads * self.head_dim and heads > 1
        if self._norm_of_all and self.groups > 1:
            reason = "normalises its keys over all heads together, which latents of each head do not allow"
            raise UserError("latents", type(module).__name__, reason=reason, hint=f"{_REMEDY}, or factor jointly")

    def __deepcopy__(self, memo: dict[int, Any]) -> LatentReader:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()

    @property
    def ranks(self) -> tuple[int, int]:
        """Channels of a latent of keys, and of values."""
        return self.keys_from.ranks[0], self.values_from.ranks[0]

    def latents(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Those of keys and values (B, G, N, r) of hidden states (B, N, width)."""
        found = [layer.down(hidden).unflatten(-1, (self.groups, -1)).transpose(1, 2)
                 for layer in (self.keys_from, self.values_from)]  # fmt: skip
        return found[0], found[1]

    def keys(self, latent: Tensor, positions: Tensor) -> Tensor:
        """Keys (B, H, N, D) of latents (B, G, N, r), rotated at positions (B, G, N) as transformers rotates them."""
        keys = self._read(self.keys_from, latent, self.norm if self._norm_of_all else None)
        if self.norm is not None and not self._norm_of_all:
            keys = self.norm(keys).to(keys.dtype)
        # Tables are float32 and then rounded, whatever the keys are.
        cos, sin = self.rotary.tables(positions, keys.new_empty(0, dtype=torch.float32))
        cos, sin = ((table * self.rotary.scaling).to(keys.dtype) for table in (cos, sin))
        pairs = cos.shape[-1]
        first, second, rest = keys.split((pairs, pairs, keys.shape[-1] - 2 * pairs), dim=-1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)

    def values(self, latent: Tensor) -> Tensor:
        """Values (B, H, N, D) of latents (B, G, N, r); of weighted means of latents, the same means of values."""
        return self._read(self.values_from, latent)

    def _read(self, layer: LowRankLinear, latent: Tensor, norm: nn.Module | None = None) -> Tensor:
        """What blocks read from their latents, by head; autocast, which is off in the attention, would convert both."""
        parts = []
        up: Any
        for up, part in zip(layer.up, latent.unbind(1), strict=True):
            read = up(part.to(up.weight.dtype))  # (B, N, H D / G)
            read = read if norm is None else norm(read)
            parts.append(read.to(latent.dtype).unflatten(-1, (-1, self.head_dim)))
        return torch.cat(parts, dim=2).transpose(1, 2)


def readers_of(
    modules: list[nn.Module], rotaries: tuple[Rotary, ...], heads: int, *, shared: bool
) -> tuple[LatentReader | None, ...]:
    """That of each layer; None for those whose projections are whole. ``shared``: all heads keep the same tokens.

    Raises:
        UserError: all are, a layer does not suit, or a latent is of heads that keep different tokens.
    """
    narrow = [isinstance(getattr(module, "k_proj", None), LowRankLinear) for module in modules]
    if not any(narrow):
        reason = "are not there: the model's keys and values are not made from any"
        raise UserError("latents", reason=reason, hint=f"{_REMEDY}, or set model.backbone.low_rank")
    readers = tuple(
        LatentReader(module, rotary, heads) if factored else None
        for module, rotary, factored in zip(modules, rotaries, narrow, strict=True)
    )
    if not shared and heads > 1 and any(reader is not None and reader.groups == 1 for reader in readers):
        reason = "are of all heads of a layer, and its heads keep different tokens"
        hint = "take the compressor SharedHeads, or factor with model.backbone.low_rank.grouping: head"
        raise UserError("latents", reason=reason, hint=hint)
    return readers


def attach_latents(module: nn.Module, reader: LatentReader | None, cache_keyword: str) -> list[Any]:
    """Let a layer's latents be taken before it attends with a cache; returns the handles of the hook."""
    if reader is None:
        return []

    def take(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if kwargs.get(cache_keyword) is None:
            return None
        return args, {**kwargs, LATENTS: reader.latents(hidden_states(args, kwargs))}

    return [module.register_forward_pre_hook(take, with_kwargs=True)]


def with_latents(key: Tensor, value: Tensor, latents: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
    """Keys and values (B, H, N, D) with their latents as further channels, which every way through a cache carries."""
    if latents is None:
        return key, value
    wide = (each.to(key.dtype).expand(-1, key.shape[1], -1, -1) for each in latents)
    key_latents, value_latents = wide
    return torch.cat([key, key_latents], dim=-1), torch.cat([value, value_latents], dim=-1)
