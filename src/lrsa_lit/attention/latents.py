"""Latents of a layer's keys and values: made from its hidden states for a cache, and turned back into both.

Dimensions: B batch, N tokens, H key-value heads, D head_dim, G latents per token (H, or 1 that all heads share),
r channels of a latent.
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
    """Makes keys and values from latents as the layer's attention does, with its weights, norm and rotation.

    Copies of a cache share the reader. A pickled cache loses it.

    Args:
        module: the attention, with low-rank factors instead of key and value projections.
        rotary: the rotation of its keys.
        heads: H.

    Raises:
        UserError: the heads have separate latents but their keys are normalised over all heads together, or the latents
            of the heads have different ranks.
    """

    def __init__(self, module: Any, rotary: Rotary, heads: int) -> None:
        self.keys_from: LowRankLinear = module.k_proj
        self.values_from: LowRankLinear = module.v_proj
        self.norm: nn.Module | None = getattr(module, "k_norm", None)
        self.rotary, self.heads, self.head_dim = rotary, heads, self.keys_from.out_features // heads
        self.groups = len(self.keys_from.ranks)
        if any(len(set(layer.ranks)) > 1 for layer in (self.keys_from, self.values_from)):
            reason = "has heads with latents of different ranks, as decomposing each head alone gives them"
            raise UserError("latents", type(module).__name__, reason=reason, hint=f"{_REMEDY}, or decompose jointly")
        weight = getattr(self.norm, "weight", None)
        self._norm_of_all = weight is not None and weight.numel() == heads * self.head_dim and heads > 1
        if self._norm_of_all and self.groups > 1:
            reason = "normalises its keys over all heads together, which separate latents per head do not allow"
            raise UserError("latents", type(module).__name__, reason=reason, hint=f"{_REMEDY}, or factor jointly")

    def __deepcopy__(self, memo: dict[int, Any]) -> LatentReader:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()

    @property
    def ranks(self) -> tuple[int, int]:
        """Channels of a key latent and of a value latent."""
        return self.keys_from.ranks[0], self.values_from.ranks[0]

    def latents(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """The latents of keys and of values (B, G, N, r) for hidden states (B, N, width)."""
        found = [layer.down(hidden).unflatten(-1, (self.groups, -1)).transpose(1, 2)
                 for layer in (self.keys_from, self.values_from)]  # fmt: skip
        return found[0], found[1]

    def keys(self, latent: Tensor, positions: Tensor) -> Tensor:
        """Keys (B, H, N, D) from latents (B, G, N, r), rotated at positions (B, G, N) as transformers does it."""
        keys = self._read(self.keys_from, latent, self.norm if self._norm_of_all else None)
        if self.norm is not None and not self._norm_of_all:
            keys = self.norm(keys).to(keys.dtype)
        # As in transformers, the tables are float32 and are then rounded to the dtype of the keys.
        cos, sin = self.rotary.tables(positions, keys.new_empty(0, dtype=torch.float32))
        cos, sin = ((table * self.rotary.scaling).to(keys.dtype) for table in (cos, sin))
        pairs = cos.shape[-1]
        first, second, rest = keys.split((pairs, pairs, keys.shape[-1] - 2 * pairs), dim=-1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)

    def values(self, latent: Tensor) -> Tensor:
        """Values (B, H, N, D) from latents (B, G, N, r). Weighted means of latents give the same means of values."""
        return self._read(self.values_from, latent)

    def _read(self, layer: LowRankLinear, latent: Tensor, norm: nn.Module | None = None) -> Tensor:
        """Apply the second factors to latents, head by head. Converts dtypes itself, because autocast is off here."""
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
    """The reader of each layer; None for layers without low-rank projections.

    Args:
        modules: the attention of each layer.
        rotaries: the rotation of each layer's keys.
        heads: H.
        shared: whether all heads keep the same tokens.

    Raises:
        UserError: no layer has latents, :class:`LatentReader` refuses a layer, or heads that share a latent keep
            different tokens.
    """
    narrow = [isinstance(getattr(module, "k_proj", None), LowRankLinear) for module in modules]
    if not any(narrow):
        reason = "do not exist: the model does not make keys and values from latents"
        raise UserError("latents", reason=reason, hint=f"{_REMEDY}, or set model.backbone.low_rank")
    readers = tuple(
        LatentReader(module, rotary, heads) if factored else None
        for module, rotary, factored in zip(modules, rotaries, narrow, strict=True)
    )
    if not shared and heads > 1 and any(reader is not None and reader.groups == 1 for reader in readers):
        reason = "are shared by all heads of a layer, but its heads keep different tokens"
        hint = "use the compressor SharedHeads, or factor with model.backbone.low_rank.grouping: head"
        raise UserError("latents", reason=reason, hint=hint)
    return readers


def attach_latents(module: nn.Module, reader: LatentReader | None, cache_keyword: str) -> list[Any]:
    """Make a layer compute its latents before it attends with a cache; returns the handles of the hook."""
    if reader is None:
        return []

    def take(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if kwargs.get(cache_keyword) is None:
            return None
        return args, {**kwargs, LATENTS: reader.latents(hidden_states(args, kwargs))}

    return [module.register_forward_pre_hook(take, with_kwargs=True)]


def with_latents(key: Tensor, value: Tensor, latents: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
    """Keys and values (B, H, N, D) with their latents as extra channels, so that both reach the cache together."""
    if latents is None:
        return key, value
    wide = (each.to(key.dtype).expand(-1, key.shape[1], -1, -1) for each in latents)
    key_latents, value_latents = wide
    return torch.cat([key, key_latents], dim=-1), torch.cat([value, value_latents], dim=-1)
