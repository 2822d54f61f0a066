"""Cascading KV cache: sub-caches, each half as dense as the one before, so that a small cache reaches far back.

Dimensions: B batch, H key-value heads, G query heads of each, N new tokens, n held pairs, M = n plus the tokens of a
stride, D head_dim, S sinks, C sub-caches of W slots each.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from lrsa_lit.bounds import check_setting, is_integer
from lrsa_lit.ops.sparse_attention import Impl, Stream, attended_pairs
from lrsa_lit.ops.sparse_attention.buffer import Pair, joined
from lrsa_lit.ops.sparse_attention.compressors import gather_kept
from lrsa_lit.ops.to_device import to_device
from lrsa_lit.systems.received_attention import attention_and_sums
from lrsa_lit.systems.system import Head, Place, System


@dataclass(frozen=True)
class Cascade(System):
    """Cascading KV cache (arXiv 2406.17808), for inference only, because what it keeps depends on the attention.

    Sinks are always kept. A sub-cache accepts every second pair that falls out of the previous one. The other pairs
    compete with its newest pair, and the one with the higher score is kept. A score is a moving average of the
    attention received. Keys are rotated by their cache slots. A prompt is processed in strides, whose tokens see the
    cache and each other; an answer is processed token by token. So the kept pairs depend on the stride.

    Args:
        window: W, slots per sub-cache (>= 1).
        caches: C, number of sub-caches (>= 1). 1 gives StreamingLLM with positions by slot.
        sink_size: S, number of first tokens that are never dropped (>= 0).
        stride: tokens of a prompt that are processed at a time (>= 1); the last stride may be shorter.
        beta: decay of the scores per token (0 to 1).
        reduce: how a key-value head's score follows from those of its query heads: max (as in the paper's scripts) or
            mean.
        eager: let all sub-caches accept every pair until they are full.
    """

    window: int = 1024
    caches: int = 4
    sink_size: int = 64
    stride: int = 512
    beta: float = 0.9999999
    reduce: Literal["max", "mean"] = "max"
    eager: bool = True
    needs_rotary: ClassVar[bool] = True
    budget_field: ClassVar[str] = "window"
    answers_by_token: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Check each bound once."""
        for name, least in (("window", 1), ("caches", 1), ("sink_size", 0), ("stride", 1)):
            value = getattr(self, name)
            check_setting(name, value, is_integer(value) and value >= least, f"an integer >= {least}")
        check_setting("beta", self.beta, isinstance(self.beta, int | float) and 0 <= self.beta <= 1, "from 0 to 1")
        check_setting("reduce", self.reduce, self.reduce in ("max", "mean"), "max or mean")

    @property
    def capacity(self) -> int:
        """The most pairs held between two strides, S + W C."""
        return self.sink_size + self.window * self.caches

    def stream(self, place: Place, impl: Impl) -> Stream:
        """See :class:`System`."""
        return CascadeStream(self, place)

    def held(self, tokens: int) -> float:
        """At most the capacity; sub-caches that are not eager may fill more slowly."""
        return min(tokens, self.capacity)

    def held_bytes(self, tokens: int, head: Head) -> float:
        """The bytes of the pairs and of a score for each."""
        return self.held(tokens) * (head.pair + max(4, head.itemsize))

    def attended_pairs(self, length: int) -> int:
        """See :class:`System`; the prompt comes in strides."""
        counts, pairs = self.empty, 0
        for start in range(0, length, self.stride):
            tokens = min(self.stride, length - start)
            pairs += tokens * sum(counts) + attended_pairs(tokens, None)
            counts = self.plan(counts, start, tokens)[1]
        return pairs

    @property
    def empty(self) -> tuple[int, ...]:
        """The counts of an empty cache: pairs held as sinks and in each sub-cache."""
        return (0,) * (self.caches + 1)

    def accepts(self, cache: int, token: int) -> bool:
        """Whether a sub-cache accepts the pair that reaches it when a token arrives, instead of letting it compete."""
        return (self.eager and token <= self.capacity) or (token - self.sink_size) % 2**cache == 0

    def phase(self, seen: int) -> int:
        """The earliest number of tokens seen after which sub-cache by sub-cache the same arrivals are accepted.

        So few plans serve all tokens of an answer, and all rows.
        """
        first = self.capacity + 1 if self.eager else 0
        return seen if seen < first else first + (seen - first) % 2 ** (self.caches - 1)

    def plan(self, counts: tuple[int, ...], seen: int, tokens: int) -> tuple[list[list[list[int]]], tuple[int, ...]]:
        """Plan which pairs compete for which slots when tokens arrive. It is the same for all heads and scores.

        Args:
            counts: pairs held as sinks and in each sub-cache.
            seen: number of earlier tokens.
            tokens: number of new tokens.

        Returns:
            For each sub-cache, its slots from the previously newest one on; empty if no pair reaches it. Each slot is a
            list of the candidates that compete for it, in order: 0 is the newest pair, if there is one, and then the
            arriving pairs follow. Second, the new counts.
        """
        new_sinks = min(self.sink_size - counts[0], tokens)
        arrivals, levels, after = list(range(seen + new_sinks, seen + tokens)), [], [counts[0] + new_sinks]
        for cache, held in enumerate(counts[1:]):
            slots, passed = ([[0]] if held else []), []
            for candidate, token in enumerate(arrivals, start=len(slots)):
                if slots and not self.accepts(cache, token):
                    slots[-1].append(candidate)
                    continue
                slots.append([candidate])
                if held + len(slots) - (held > 0) > self.window:
                    passed.append(token)
            after.append(min(held + len(slots) - (held > 0), self.window))
            levels.append(slots if arrivals else [])
            arrivals = passed
        return levels, tuple(after)


@functools.lru_cache(maxsize=256)
def _plan(
    system: Cascade, counts: tuple[int, ...], seen: int, tokens: int, device: torch.device
) -> tuple[list[Tensor], tuple[int, ...]]:
    """:meth:`Cascade.plan`, computed once for all layers: (most candidates of a slot, slots) for each sub-cache."""
    levels, after = system.plan(counts, seen, tokens)
    tables = []
    with torch.inference_mode(False):
        for slots in levels:
            most = max(map(len, slots), default=1)
            # Padding repeats the last candidate, which competes again with the winner or with itself.
            filled = [slot + slot[-1:] * (most - len(slot)) for slot in slots]
            # Of int64 also if it is empty.
            table = torch.tensor(filled, dtype=torch.int64, device="cpu")
            tables.append(to_device(table.view(-1, most).T, device))
    return tables, after


def keep(system: Cascade, counts: tuple[int, ...], seen: int, score: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """Choose the pairs that are kept when new tokens enter a cache.

    Args:
        system: the system of the cache.
        counts: pairs held so far as sinks and in each sub-cache.
        seen: number of earlier tokens.
        score: (B, H, M), of the held pairs followed by the new tokens.

    Returns:
        Indices (B, H, n) of the kept pairs: sinks first, then from the oldest sub-cache to the newest. Second, the new
        counts.
    """
    tokens = score.shape[-1] - sum(counts)
    if tokens == 1:
        return keep_in_rows(system, counts, (seen,), score)
    tables, after = _plan(system, counts, system.phase(seen), tokens, score.device)
    columns = torch.arange(score.shape[-1], device=score.device).expand(score.shape)
    *held, arrived = columns.split([counts[0], *reversed(counts[1:]), tokens], dim=-1)
    new_sinks = after[0] - counts[0]
    sinks, arrived = torch.cat([held[0], arrived[..., :new_sinks]], dim=-1), arrived[..., new_sinks:]
    kept = []
    for table, cache in zip(tables, reversed(held[1:]), strict=True):
        if table.shape[1]:
            rivals = torch.cat([cache[..., -1:], arrived], dim=-1)
            cache = torch.cat([cache[..., :-1], _winners(rivals, score, table)], dim=-1)
        passed = max(cache.shape[-1] - system.window, 0)
        arrived, cache = cache[..., :passed], cache[..., passed:]
        kept.append(cache)
    return torch.cat([sinks, *reversed(kept)], dim=-1), after


@functools.lru_cache(maxsize=4096)
def _rivals(system: Cascade, counts: tuple[int, ...], seen: int) -> tuple[tuple[int, int] | None, tuple[int, ...]]:
    """The columns of the two pairs that compete when one token arrives, and the new counts.

    The columns are equal if a pair is dropped without competing. None if all stay.
    """
    levels, after = system.plan(counts, seen, 1)
    # From the newest sub-cache on, whose pairs are next to the new token, to older ones.
    arrival, stop = sum(counts), sum(counts)
    for slots, held in zip(levels, counts[1:], strict=True):
        if not slots:
            return None, after
        if len(slots[-1]) > 1:
            return (stop - 1, arrival), after
        arrival = stop = stop - held
    return (None if sum(after) > sum(counts) else (arrival, arrival)), after


def keep_in_rows(
    system: Cascade, counts: tuple[int, ...], seen: Sequence[int], score: Tensor
) -> tuple[Tensor, tuple[int, ...]]:
    """:func:`keep` for one new token in each of several rows.

    Args:
        system: as in :func:`keep`.
        counts: those of each row, which must also have equal new counts.
        seen: number of earlier tokens of each row; one number for all.
        score: (B, H, M).
    """
    found = [_rivals(system, counts, system.phase(tokens)) for tokens in seen]
    columns, after = torch.arange(sum(found[0][1]), device=score.device), found[0][1]
    pairs = [pair for pair, _ in found if pair is not None]
    if not pairs:
        return columns.expand(*score.shape[:2], -1), after
    rivals = _on_device(tuple(zip(*pairs, strict=True)), score.device)
    first, second = (numbers.view(-1, 1, 1).expand(*score.shape[:2], 1) for numbers in rivals)
    dropped = torch.where(score.gather(-1, second) >= score.gather(-1, first), first, second)
    return columns + (columns >= dropped), after


@functools.lru_cache(maxsize=64)
def _on_device(numbers: tuple[tuple[int, ...], ...], device: torch.device) -> Tensor:
    """A table, copied once for all layers."""
    with torch.inference_mode(False):
        return to_device(numbers, device)


def _winners(rivals: Tensor, score: Tensor, table: Tensor) -> Tensor:
    """The winning candidate, out of (B, H, R), for each slot: (B, H, slots). Of equal scores the later wins."""
    best = rivals[..., table[0]]
    for row in table[1:]:
        other = rivals[..., row]
        best = torch.where(score.gather(-1, other) >= score.gather(-1, best), other, best)
    return best


class CascadeStream(Stream):
    """Holds the cached pairs, with keys without their rotation, and the tokens of the current stride."""

    part_by_part: ClassVar[bool] = True

    def __init__(self, system: Cascade, place: Place) -> None:
        assert place.rotary is not None
        self.system, self.place, self.rotary = system, place, place.rotary
        self.seen, self.stride = 0, system.stride
        self.counts = system.empty
        self._pairs = 0
        # The tokens that each row has seen: only while rows of unequal lengths attend together.
        self._of_rows: tuple[int, ...] = ()
        self._pair: Pair | None = None
        # Scores (B, H, n), and the attention (B, H, G, M) from the queries of the current stride so far.
        self._score: Tensor | None = None
        self._gain: Tensor | None = None

    @property
    def stored(self) -> Pair | None:
        """The stored keys and values; the tokens of the current stride come last."""
        return self._pair

    @property
    def waiting(self) -> int:
        """The number of tokens in the current stride."""
        return 0 if self._pair is None else self._pair[0].shape[2] - sum(self.counts)

    @property
    def nbytes(self) -> int:
        """Bytes stored, including scores."""
        return super().nbytes + sum(x.nbytes for x in (self._score, self._gain) if x is not None)

    @property
    def attended_pairs(self) -> float:
        """See :class:`Stream`."""
        return self._pairs

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """See :class:`Stream`; calls are split where strides end."""
        outputs, start = [], 0
        while start < key.shape[2]:
            part = slice(start, start + self.stride - self.waiting)
            outputs.append(self._attend_stride(query[:, :, part], key[:, :, part], value[:, :, part], scale))
            start = min(part.stop, key.shape[2])
            if self.waiting == self.stride:
                self._insert()
        return torch.cat(outputs, dim=2)

    @classmethod
    def attend_rows(
        cls, streams: Sequence[Stream], query: Tensor, key: Tensor, value: Tensor, scale: float
    ) -> Tensor | None:
        """See :class:`Stream`. Rows of an answer that hold equally many pairs, before and after, attend together."""
        rows = [stream for stream in streams if isinstance(stream, cls)]
        if any(row.stride > 1 or row._score is None for row in rows):
            return None
        alike: dict[tuple[tuple[int, ...], ...], list[int]] = {}
        for index, row in enumerate(rows):
            after = _rivals(row.system, row.counts, row.system.phase(row.seen))[1]
            alike.setdefault((row.counts, after), []).append(index)
        output = torch.empty_like(query)
        for indices in alike.values():
            some = [rows[index] for index in indices]
            # A slice needs no copy from the host.
            at = slice(None) if len(indices) == len(rows) else to_device(indices, query.device)
            output[at] = _together(some, query[at], key[at], value[at], scale)
        return output

    def end_prompt(self) -> None:
        """Insert the rest of the current stride; from now on each token is a stride."""
        if self.waiting:
            self._insert()
        self.stride = 1

    def _attend_stride(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """:meth:`attend` for tokens of one stride."""
        count, beta = key.shape[2], self.system.beta
        if self._of_rows:
            positions = _on_device((self._of_rows,), key.device).view(-1, 1, 1)
        else:
            positions = self.seen + torch.arange(count, device=key.device)
        new = self.rotary.unrotate(key, positions).to(key.dtype), value
        # Always copies, because the given tensors may be views of larger ones.
        self._pair = joined(self._pair or (key[:, :, :0], value[:, :, :0]), new)
        slots = torch.arange(self._pair[0].shape[2], device=key.device)
        rotated = self.rotary.rotate(self._pair[0], slots).to(key.dtype)
        turned = self.rotary.rotate(self.rotary.unrotate(query, positions), slots[-count:]).to(query.dtype)
        weights = (1 - beta) * beta ** torch.arange(count - 1, -1, -1, dtype=torch.float64, device=key.device)
        grouped = turned.unflatten(1, (key.shape[1], -1))
        output, gain = attention_and_sums(grouped, rotated, self._pair[1], scale, weights)
        self._gain = gain if self._gain is None else pad(self._gain, (0, count)) * beta**count + gain
        self.seen += count
        self._pairs += count * (len(slots) - count) + attended_pairs(count, None)
        return output.flatten(1, 2)

    def _insert(self) -> None:
        """End the stride: insert its tokens into the sub-caches, one after another."""
        assert self._gain is not None
        assert self._pair is not None
        self._peak = self.peak_nbytes
        tokens, held = self.waiting, sum(self.counts)
        score = self._gain.amax(dim=2) if self.system.reduce == "max" else self._gain.mean(dim=2)
        if self._score is not None:
            score = score + pad(self._score * self.system.beta**tokens, (0, score.shape[-1] - held))
        if self._of_rows:
            kept, self.counts = keep_in_rows(self.system, self.counts, self._of_rows, score)
        else:
            kept, self.counts = keep(self.system, self.counts, self.seen - tokens, score)
        self._pair = gather_kept(self._pair[0], kept), gather_kept(self._pair[1], kept)
        self._score, self._gain = score.gather(-1, kept), None

    def rows(self, indices: Tensor) -> CascadeStream:
        """See :class:`Stream`."""
        other = CascadeStream(self.system, self.place)
        other.seen, other.stride, other.counts, other._pairs = self.seen, self.stride, self.counts, self._pairs
        other._pair = None if self._pair is None else (self._pair[0][indices], self._pair[1][indices])
        other._score = None if self._score is None else self._score[indices]
        other._gain = None if self._gain is None else self._gain[indices]
        other._peak = 0 if self._pair is None else self._peak // len(self._pair[0]) * len(indices)
        return other


def _together(rows: Sequence[CascadeStream], query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """:meth:`CascadeStream.attend` for one token of an answer in each of several rows that hold equally many pairs."""
    if len(rows) == 1:
        return rows[0].attend(query, key, value, scale)
    first, pairs, scores = rows[0], [], []
    for row in rows:
        assert row._pair is not None
        assert row._score is not None
        pairs.append(row._pair)
        scores.append(row._score)
    one = CascadeStream(first.system, first.place)
    one.seen, one.stride, one.counts = first.seen, first.stride, first.counts
    one._of_rows = tuple(row.seen for row in rows)
    keys, values = zip(*pairs, strict=True)
    one._pair, one._score = (torch.cat(keys), torch.cat(values)), torch.cat(scores)
    output = one.attend(query, key, value, scale)
    parts = zip(*(part.split(1) for part in (*one._pair, one._score)), strict=True)
    for row, (own_key, own_value, score) in zip(rows, parts, strict=True):
        row._pair, row._score, row.counts, row.seen = (own_key, own_value), score, one.counts, row.seen + 1
        row._pairs, row._peak = row._pairs + one._pairs, max(row._peak, one._peak // len(rows))
    return output
