"""The cache of a layer that holds latents: those of the kept tokens, and their positions.

Dimensions: B batch, H key-value heads, Hq query heads, N new tokens, D head_dim, G latents per token (H, or 1 that all
heads share), r channels of a latent, P partitions, K top_k, S sink_size, L lag_size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lrsa_lit.attention.latents import LatentReader
from lrsa_lit.errors import UserError
from lrsa_lit.ops.sparse_attention import Held, Impl, KeyValueStream, Rule, Selector
from lrsa_lit.ops.sparse_attention.buffer import Pair, PairBuffer, RowBuffer
from lrsa_lit.ops.sparse_attention.compressors import gather_kept
from lrsa_lit.ops.sparse_attention.geometry import compact_size
from lrsa_lit.ops.sparse_attention.selection import partitions_of

_CLOSE = 1e-2
"""Largest relative distance of keys made from latents to the layer's own keys: bfloat16 rounds both."""

Latents = tuple[Tensor, Tensor, Tensor]
"""Latents of keys and of values (B, G, rows, r), and positions (B, G, rows, 1) int32."""


class LatentStream(KeyValueStream):
    """A :class:`KeyValueStream` that holds latents between calls: of sinks, kept tokens, then the raw window.

    Each call makes the keys of all held tokens from their latents, at their own positions. It makes the values only for
    a compression or if several tokens attend. A single token attends to the latents of values, and the values' second
    factor is applied once, to the output. Selection scores the keys and values made from latents, so it keeps the same
    tokens as a cache of keys and values.

    Keys and values come with their latents as extra channels (:func:`~lrsa_lit.attention.latents.with_latents`).
    """

    def __init__(self, rule: Rule | None, reader: LatentReader | None, impl: Impl = "auto") -> None:
        super().__init__(rule, impl)
        self.reader = reader
        self._held: RowBuffer[Latents] | None = None
        self._kept: Tensor | None = None

    @property
    def stored(self) -> Pair | None:
        """Keys and values of all held tokens, made from the latents."""
        if self._held is None:
            return None
        return self._keys(), self._values()

    @property
    def stored_shape(self) -> torch.Size | None:
        """See :class:`Stream`."""
        if self._held is None:
            return None
        batch, _, rows, _ = self._held.filled[0].shape
        return torch.Size((batch, self._reader.heads, rows, self._reader.head_dim))

    @property
    def buffers(self) -> list[RowBuffer[Any]]:
        """The buffers: latents with positions, and queries if the compressor needs them."""
        return [buffer for buffer in (self._held, self._queries) if buffer is not None]

    @property
    def held(self) -> Held:
        """Latents and positions instead of pairs; queries if the compressor needs them."""
        named: dict[str, RowBuffer[Any] | None] = {"latents": self._held, "queries": self._queries}
        return {name: buffer.filled for name, buffer in named.items() if buffer is not None}

    def _restore(self, held: Held) -> None:
        of_keys, of_values, positions = held["latents"]
        self._held = RowBuffer(of_keys, of_values, positions)
        self._restore_queries(held)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """See :class:`Stream`; keys and values are (B, H, N, D + r)."""
        key, value = self._take(query.shape[-1], key, value)
        if query.shape[2] == 1 and not self.due:
            return self._attend_to_latents(query, scale)
        # Those of the new tokens are there already.
        before = self._rows - key.shape[2]
        read = (self._keys(before), self._values(before)) if before else (key[:, :, :0], value[:, :, :0])
        self._probing = max(self._probing, sum(part.nbytes for part in (*read, key, value)))
        self._store = PairBuffer(*read)
        try:
            return self._attend(query, key, value, scale)
        finally:
            self._store = None

    def rows(self, indices: Tensor) -> LatentStream:
        """See :class:`Stream`."""
        other = LatentStream(self.rule, self.reader, self.impl)
        other.seen, other.partitions = self.seen, self.partitions
        other._held = None if self._held is None else self._held.rows(indices)
        other._queries = None if self._queries is None else self._queries.rows(indices)
        return other

    def _take(self, dim: int, key: Tensor, value: Tensor) -> Pair:
        """Store the latents of new tokens; returns their keys and values (B, H, N, D)."""
        reader, count = self._reader, key.shape[2]
        (key, of_key), (value, of_value) = (part.split((dim, part.shape[-1] - dim), dim=-1) for part in (key, value))
        # Latents that all heads share were repeated for each head.
        latents = of_key[:, : reader.groups], of_value[:, : reader.groups]
        places = torch.arange(self.seen, self.seen + count, device=key.device, dtype=torch.int32)
        positions = places[:, None].expand(key.shape[0], reader.groups, -1, 1)
        if self._held is None:
            self._check(key, latents[0], positions)
            self._held = RowBuffer(*latents, positions)
        else:
            self._held.append((*latents, positions))
        return key, value

    def _check(self, key: Tensor, latent: Tensor, positions: Tensor) -> None:
        """Refuse a layer whose own keys differ from the keys made from latents."""
        read = self._reader.keys(latent[:, :, :8], positions[:, :, :8, 0])
        own = key[:, :, :8]
        if bool((read - own).norm() > _CLOSE * own.norm()):
            reason = "do not give the model's keys: the model makes keys in another way, or at other positions"
            raise UserError("latents", reason=reason, hint="set latents: false")

    def _attend_to_latents(self, query: Tensor, scale: float) -> Tensor:
        """Attention (B, Hq, 1, D) of one token that is already stored: first over latents, then to values."""
        keys, latent = self._keys(), self._filled[1]
        self._probing = max(self._probing, keys.nbytes)
        if self.rule.compressor.window:
            self._remember(query)
        self.seen += 1
        grouped = query.unflatten(1, (keys.shape[1], -1))[..., 0, :]  # (B, H, Hq / H, D)
        weights = (grouped @ keys.mT * scale).softmax(dim=-1, dtype=torch.promote_types(query.dtype, torch.float32))
        got = weights.to(latent.dtype) @ latent  # (B, H, Hq / H, r)
        if self._reader.groups > 1:
            return self._reader.values(got).flatten(1, 2)[:, :, None]
        heads, group = got.shape[1:3]
        read: Tensor = self._reader.values(got.flatten(1, 2)[:, None]).unflatten(2, (heads, group))  # (B, H, H, …, D)
        return read.diagonal(dim1=1, dim2=2).permute(0, 3, 1, 2).flatten(1, 2)[:, :, None]

    def _compact(self, key: Tensor, value: Tensor, count: int, windows: Tensor | None) -> Pair:
        """The pairs that the selector keeps; their indices are stored in ``_kept``."""
        selector, rule = self.rule.compressor, self.rule
        assert isinstance(selector, Selector)
        indices, _ = selector.keep(partitions_of(key, value, rule, count, self.partitions, windows))
        starts = rule.lag_size * torch.arange(count, device=key.device)
        self._kept = (indices + starts[:, None]).flatten(2, 3)
        return gather_kept(key, self._kept), gather_kept(value, self._kept)

    def _compress(self, buffer: PairBuffer, raw: Pair, partitions: int, queries: Tensor | None) -> Pair:
        """Compress like the base class, and the latents in the same way."""
        before = self.partitions
        recent = super()._compress(buffer, raw, partitions, queries)
        assert self._held is not None
        assert self._kept is not None
        kept, self._kept = self._kept[:, : self._reader.groups], None
        sinks = self.rule.sink_size if before == 0 else 0
        rest = self._held.cut(compact_size(before, self.rule))
        dropped = sinks + (partitions - before) * self.rule.lag_size
        for part in (
            tuple(each[:, :, :sinks] for each in rest),
            tuple(gather_kept(each[:, :, sinks:], kept) for each in rest),
            tuple(each[:, :, dropped:] for each in rest),
        ):
            self._held.append(part)  # type: ignore[arg-type]
        return recent

    @property
    def _reader(self) -> LatentReader:
        if self.reader is None:
            raise UserError("cache", reason="holds latents and was loaded without its model; make a new one")
        return self.reader

    @property
    def _filled(self) -> Latents:
        assert self._held is not None
        return self._held.filled

    @property
    def _rows(self) -> int:
        return self._filled[0].shape[2]

    def _keys(self, rows: int | None = None) -> Tensor:
        """Keys of the first ``rows`` held tokens, or of all."""
        latent, _, positions = (part[:, :, :rows] for part in self._filled)
        return self._reader.keys(latent, positions[..., 0])

    def _values(self, rows: int | None = None) -> Tensor:
        return self._reader.values(self._filled[1][:, :, :rows])
