"""FreqKV: a bounded cache that is repeatedly replaced by its low frequencies.

Dimensions: B batch, H key-value heads, Hq query heads, T tokens, D head_dim, N capacity, S sinks, F = N - S slots that
are compressed to K = int(gamma F), R rounds of F - K tokens each.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from lrsa_lit.bounds import check_setting, is_integer, is_weight
from lrsa_lit.ops.sparse_attention import Impl, KeyValueStream, Rotary, Stream, attended_pairs, dense_attention
from lrsa_lit.ops.sparse_attention.buffer import Pair
from lrsa_lit.ops.sparse_attention.synthesizers import low_pass
from lrsa_lit.systems.system import Place, System, sequences


@dataclass(frozen=True)
class FreqKV(System):
    """FreqKV (arXiv 2505.00570), recursive as published: a bounded cache whose positions are cache slots.

    The first N tokens attend as usual. After that, before every (F - K)-th token, the F pairs after the sinks are
    compressed to K: a DCT along the slots, its K lowest frequencies, an inverse DCT of length K. So old tokens are
    compressed many times. Keys are compressed without their rotation and then rotated by their slots; queries are
    rotated by their token's slot. No position reaches N. Decoding follows the same rule as prefill; the paper's code
    does not decode.

    Without training, expect poor results beyond N tokens, because positions change. Always report a trained model as
    well. The compressor ``FreqPartition`` is our variant per partition.

    Args:
        capacity: the most pairs that a head holds (N > S).
        sink_size: number of first tokens of a sequence that are never compressed (S >= 0).
        gamma: share of the other slots that a compression leaves (0 <= gamma < 1); with 0 only sinks are left.
    """

    capacity: int = 4096
    sink_size: int = 4
    gamma: float = 0.5
    trains: ClassVar[bool] = True
    needs_rotary: ClassVar[bool] = True
    graphable: ClassVar[bool] = True
    rotates_by_slot: ClassVar[bool] = True
    budget_field: ClassVar[str] = "capacity"

    def __post_init__(self) -> None:
        """Check each bound once."""
        sinks = is_integer(self.sink_size) and self.sink_size >= 0
        check_setting("sink_size", self.sink_size, sinks, "an integer >= 0")
        room = is_integer(self.capacity) and self.capacity > self.sink_size
        check_setting("capacity", self.capacity, room, f"an integer above sink_size = {self.sink_size}")
        share = is_weight(self.gamma) and self.gamma < 1
        check_setting("gamma", self.gamma, share, "a number from 0 to below 1: with 1 a round would free no slot")

    @property
    def compressed(self) -> int:
        """The number of slots after a compression, K."""
        return int(self.gamma * (self.capacity - self.sink_size))

    def floor(self, tokens: int) -> int:
        """The sinks and one more slot."""
        return self.sink_size + 1

    def held(self, tokens: int) -> float:
        """The capacity, which is reached before each compression; fewer pairs are held after one."""
        return min(tokens, self.capacity)

    @property
    def first(self) -> int:
        """The slot of the first token of a round, S + K."""
        return self.sink_size + self.compressed

    @property
    def step(self) -> int:
        """Tokens in a round, F - K."""
        return self.capacity - self.first

    def stream(self, place: Place, impl: Impl) -> Stream:
        """See :class:`System`."""
        return FreqKVStream(self, place, impl)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, *, cu_seqlens: Tensor | None, scale: float, place: Place
    ) -> Tensor:
        """See :class:`System`. The pairs of all rounds are computed first, then the rounds attend as one batch.

        If there are fewer queries than keys, they are the last ones.
        """
        assert place.rotary is not None
        past = key.shape[2] - query.shape[2]
        query = pad(query, (0, 0, past, 0)) if past else query
        parts = sequences(query, key, value, cu_seqlens)
        return torch.cat([self._attend_sequence(*part, scale, place.rotary) for part in parts], dim=2)[:, :, past:]

    def attended_pairs(self, length: int) -> int:
        """See :class:`System`."""
        whole, rest = divmod(max(length - self.capacity, 0), self.step)
        later = (count * self.first + attended_pairs(count, None) for count in (self.step, rest))
        of_round, of_last = later
        return attended_pairs(min(length, self.capacity), None) + whole * of_round + of_last

    def rounds(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Split the positions [start, stop) where rounds begin."""
        while start < stop:
            ahead = self.capacity - start if start < self.capacity else self.step - (start - self.capacity) % self.step
            yield start, min(start + ahead, stop)
            start += ahead

    def begins(self, position: int) -> bool:
        """Whether the cache is compressed before the token at this position."""
        return position >= self.capacity and (position - self.capacity) % self.step == 0

    def slot(self, position: int) -> int:
        """The cache slot of the token at this position."""
        return position if position < self.capacity else self.first + (position - self.capacity) % self.step

    def compress(self, raw: Tensor) -> Tensor:
        """Compress keys without rotation, or values, (…, F, D) -> (…, K, D), at least float32."""
        weights = transform(raw.shape[-2], self.compressed, raw.device, torch.promote_types(raw.dtype, torch.float32))
        made: Tensor = weights @ raw.to(weights.dtype)
        return made

    def _attend_sequence(self, query: Tensor, key: Tensor, value: Tensor, scale: float, rotary: Rotary) -> Tensor:
        """:meth:`attend` for one sequence."""
        begin, tokens = self.capacity, key.shape[2]
        first = dense_attention(*(x[:, :, :begin] for x in (query, key, value)), scale=scale)
        if tokens <= begin:
            return first
        places = torch.arange(tokens, device=key.device)
        raw = rotary.unrotate(key, places)
        queries = self._by_round(rotary.unrotate(query[:, :, begin:], places[begin:]))
        slots = places[self.first : begin]
        queries = rotary.rotate(queries, slots).to(query.dtype)
        # Keys and values together, because each round costs the host as much for both as for one.
        held = torch.cat(self._held(torch.cat([raw, value.to(raw.dtype)], dim=1)), dim=-2)
        held_keys, held_values = held.chunk(2, dim=2)
        keys = self._behind_sinks(key, rotary.rotate(held_keys, places[self.sink_size : begin]))
        values = self._behind_sinks(value, held_values)
        later = dense_attention(*(x.flatten(0, 1) for x in (queries, keys, values)), scale=scale)
        later = later.unflatten(0, (key.shape[0], -1)).transpose(1, 2).flatten(2, 3)
        return torch.cat([first, later[:, :, : tokens - begin]], dim=2)

    def _by_round(self, x: Tensor) -> Tensor:
        """Split by rounds: (B, H, T - N, D) -> (B, R, H, F - K, D), padded with zeros."""
        missing = -x.shape[2] % self.step
        rounds: Tensor = pad(x, (0, 0, 0, missing)).unflatten(2, (-1, self.step)).transpose(1, 2)
        return rounds

    def _held(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The K compressed rows and the tokens of each round, (B, R, H, …, D), of unrotated keys and values."""
        tokens = self._by_round(x[:, :, self.capacity :])
        compact = [self.compress(x[:, :, self.sink_size : self.capacity])]
        for index in range(tokens.shape[1] - 1):
            compact.append(self.compress(torch.cat([compact[-1], tokens[:, index].to(compact[-1].dtype)], dim=2)))
        return torch.stack(compact, dim=1), tokens

    def _behind_sinks(self, x: Tensor, rest: Tensor) -> Tensor:
        """Prepend the sinks of keys or values (B, H, T, D) to each round's rows (B, R, H, F, D)."""
        sinks = x[:, None, :, : self.sink_size].expand(-1, rest.shape[1], -1, -1, -1)
        return torch.cat([sinks, rest.to(x.dtype)], dim=-2)


class FreqKVStream(KeyValueStream):
    """The cache of FreqKV. Slots change only when it is compressed, so keys are stored rotated by their slots."""

    part_by_part: ClassVar[bool] = True

    def __init__(self, system: FreqKV, place: Place, impl: Impl) -> None:
        assert place.rotary is not None
        super().__init__(None, impl)
        self.system, self.place, self.rotary = system, place, place.rotary

    @property
    def attended_pairs(self) -> float:
        """See :class:`Stream`."""
        return self.system.attended_pairs(self.seen)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """See :class:`Stream`."""
        begin = self.seen
        outputs = []
        for start, stop in self.system.rounds(begin, begin + key.shape[2]):
            self.advance()
            part = slice(start - begin, stop - begin)
            outputs.append(self._attend_round(query[:, :, part], key[:, :, part], value[:, :, part], scale))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)

    def _attend_round(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """:meth:`attend` for tokens between which nothing is compressed."""
        count, slot = key.shape[2], self.system.slot(self.seen)
        if slot != self.seen:
            places = torch.arange(count, device=key.device)
            turned = (
                self.rotary.rotate(self.rotary.unrotate(x, self.seen + places), slot + places) for x in (query, key)
            )
            query, key = (x.to(value.dtype) for x in turned)
        self._reserve(key, value)
        return super().attend(query, key, value, scale)

    def _reserve(self, key: Tensor, value: Tensor) -> None:
        """Reserve memory for more pairs, as a buffer does, but never beyond the capacity."""
        buffer = self._store_for(key, value)
        needed = buffer.length + key.shape[2]
        if needed > buffer.capacity and not torch.is_grad_enabled():
            rows = min(needed + needed // 32, self.system.capacity)
            shape = *key.shape[:2], rows, key.shape[3]
            buffer.move_to((key.new_empty(shape), value.new_empty(shape)))

    @property
    def due(self) -> bool:
        """See :class:`KeyValueStream`."""
        return self.system.begins(self.seen) and self.buffer.length == self.system.capacity

    @property
    def position(self) -> int:
        """The next token's slot."""
        return self.system.slot(self.seen)

    def advance(self) -> None:
        """Compress F slots to K, if this is due."""
        if not self.due:
            return
        self._peak = max(self._peak, self.nbytes)
        system, sinks = self.system, self.system.sink_size
        key, value = self.buffer.cut(sinks)
        slots = torch.arange(sinks, system.capacity, device=key.device)
        compact = system.compress(self.rotary.unrotate(key, slots))
        turned = self.rotary.rotate(compact, slots[: system.compressed])
        pairs: Pair = (turned.to(key.dtype), system.compress(value).to(value.dtype))
        self.buffer.append(pairs)

    def most_stored(self, tokens: int) -> int:
        """See :class:`KeyValueStream`."""
        return min(self.seen + tokens, self.system.capacity)

    def rows(self, indices: Tensor) -> FreqKVStream:
        """See :class:`Stream`."""
        other = FreqKVStream(self.system, self.place, self.impl)
        other.seen = self.seen
        other._peak = self._peak // len(self.buffer.whole[0]) * len(indices) if self._peak else 0
        other._store = None if self._store is None else self._store.rows(indices)
        return other


@functools.lru_cache(maxsize=8)
def transform(slots: int, compressed: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """W (K, F) of :func:`low_pass`, computed once for all layers and rounds."""
    with torch.inference_mode(False), torch.no_grad():
        return low_pass(slots, compressed, device).to(dtype)
