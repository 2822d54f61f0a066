"""The operator chunk by chunk: keys and values arrive over several calls and are compressed where the rule says.

Dimensions: B batch, H key-value heads, Hq query heads, G query heads per key-value head, D head_dim, S sink_size, L
lag_size, K top_k, P partitions, w window of the compressor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lrsa_lit.ops.sparse_attention import eager
from lrsa_lit.ops.sparse_attention.abstract_stream import Stream
from lrsa_lit.ops.sparse_attention.api import Impl, implementation
from lrsa_lit.ops.sparse_attention.buffer import Pair, PairBuffer, RowBuffer, Seen, joined
from lrsa_lit.ops.sparse_attention.geometry import (
    attended_pairs,
    compact_size,
    compressed_at,
    raw_start,
    stored_queries,
    stored_size,
    window_start,
)
from lrsa_lit.ops.sparse_attention.rule import KEEP_ALL, Rule
from lrsa_lit.ops.sparse_attention.slot_bias import narrow, through_channels
from lrsa_lit.ops.sparse_attention.token_scores import bare_keys, without_scores

_Given = tuple[Tensor, Tensor, int, Tensor | None]
"""The arguments of :meth:`KeyValueStream._compact`."""

Held = Mapping[str, tuple[Tensor, ...]]
"""The contents of a stream by name: pairs (or latents and positions) and queries, (B, heads, rows, channels)."""


class KeyValueStream(Stream):
    """The sinks, kept pairs and raw window of a rule.

    Any split of the tokens into calls gives the outputs of the parallel pass, because partitions are compressed where
    the rule's chunks start and not where calls end. After a call, ``geometry.stored_size`` tokens per head are stored.
    A compressor with a window has a second buffer of queries: the last w of each partition that will still be a
    reference. If the rule is None, everything is kept (a dense layer).
    """

    def __init__(self, rule: Rule | None, impl: Impl = "auto") -> None:
        self.rule = KEEP_ALL if rule is None else rule
        self.impl = impl
        self.seen = 0
        self.partitions = 0
        self._store: PairBuffer | None = None
        self._queries: RowBuffer[tuple[Tensor]] | None = None
        self._probed = 0

    @property
    def nbytes(self) -> int:
        """Bytes stored, including queries."""
        return sum(buffer.nbytes for buffer in self.buffers)

    @property
    def attended_pairs(self) -> float:
        """The pairs that the rule lets queries see, and those of :meth:`probe`."""
        return attended_pairs(self.seen, self.rule) + self._probed

    @property
    def buffers(self) -> list[RowBuffer[Any]]:
        """The :attr:`buffer`, and the buffer of queries if the compressor needs one; empty before the first token."""
        return [buffer for buffer in (self._store, self._queries) if buffer is not None]

    @property
    def held(self) -> Held:
        """Everything that is stored, by name: views of the filled rows, compact ones first."""
        named = {"pairs": self._store, "queries": self._queries}
        return {name: buffer.filled for name, buffer in named.items() if buffer is not None}

    def restore(self, seen: int, held: Held) -> None:
        """Continue from copies of what a stream with the same rule :attr:`held` between two calls; self must be empty.

        Args:
            seen: tokens that the other stream had received.
            held: its contents, each (B, heads, rows, channels).
        """
        self.seen, self.partitions = seen, compressed_at(seen - 1, self.rule)
        self._restore(held)

    def start(self, compact: Pair, raw: Pair, query: Tensor) -> None:
        """Store the first N tokens, which were compressed and attended to elsewhere; self must be empty.

        Args:
            compact: the sinks and kept pairs that the last token sees, keys and values (B, H, S + K P, D).
            raw: all N tokens, (B, H, N, D).
            query: their queries (B, Hq, N, D).
        """
        seen = raw[0].shape[2]
        self.partitions = compressed_at(seen - 1, self.rule)
        first, buffer = raw_start(self.partitions, self.rule), self._store_for(*raw)
        buffer.reserve(stored_size(seen, self.rule))
        buffer.append(compact)
        buffer.append((raw[0][:, :, first:], raw[1][:, :, first:]))
        self._remember(query)
        self.seen = seen

    @property
    def settled(self) -> int:
        """How many of the first :attr:`held` rows never change: the compact rows, or all if everything is kept."""
        return self.buffers[0].length if self.rule is KEEP_ALL else compact_size(self.partitions, self.rule)

    def rewind(self) -> None:
        """Forget all tokens but the first; only before anything is compressed."""
        assert not self.partitions
        self.buffers[0].length = self.seen = 1
        for queries in self.buffers[1:]:
            queries.length = stored_queries(1, self.rule)

    def _restore(self, held: Held) -> None:
        key, value = held["pairs"]
        self._store = PairBuffer(key, value)
        self._restore_queries(held)

    def _restore_queries(self, held: Held) -> None:
        if "queries" in held:
            (queries,) = held["queries"]
            self._queries = RowBuffer(queries)

    @property
    def buffer(self) -> PairBuffer:
        """The buffer of keys and values; it exists from the first token on."""
        assert self._store is not None
        return self._store

    @property
    def stored(self) -> Pair | None:
        """The stored keys and values, compact pairs first."""
        if self._store is None:
            return None
        key, value = self._bare(self._store.filled)
        return (narrow(key), narrow(value)) if self.rule.compressor.has_bias else (key, value)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """See :class:`Stream`."""
        if self.rule.compressor.has_bias:
            return through_channels(self._attend, query, key, value, scale)
        return self._attend(query, key, value, scale)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        count = key.shape[2]
        if self.crosses(count):
            return self._attend_across(query, key, value, scale)
        # All new tokens see everything that is stored, up to themselves.
        return self._attend_to(self.extend(key, value, query), query, scale)

    def probe(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """:meth:`attend` for tokens that are not stored; only for streams that keep everything."""
        self._probed += attended_pairs(self.seen + key.shape[2], None) - attended_pairs(self.seen, None)
        pairs = joined(self.buffer.filled, (key, value))
        self._probing = max(self._probing, sum(part.nbytes for part in pairs))
        return self._attend_to(pairs, query, scale)

    def _attend_to(self, visible: Pair, query: Tensor, scale: float) -> Tensor:
        """Causal attention of the queries (B, Hq, N, D) of the last N tokens to the pairs (B, H, …, D)."""
        visible = key, value = self._bare(visible)
        if (count := query.shape[2]) == 1:
            grouped = query.unflatten(1, (key.shape[1], -1))
            return eager.causal_attention(grouped, *visible, scale).flatten(1, 2)
        nothing, past = (key[:, :, :0], value[:, :, :0]), key.shape[2] - count
        attend = implementation(self.impl, query).attend
        output: Tensor = attend(query, nothing, visible, KEEP_ALL, scale=scale, query_offset=past)
        return output

    def _attend_across(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """:meth:`attend` for tokens that see different numbers of compressed partitions."""
        seen = self.take(query, key, value)
        attend = implementation(self.impl, query).attend
        places = {"query_offset": seen.new_from, "raw_offset": seen.raw_from}
        output: Tensor = attend(query, seen.compact, seen.raw, self.rule, scale=scale, **places)
        return output

    def take(self, query: Tensor, key: Tensor, value: Tensor) -> Seen:
        """Store N new tokens as :meth:`attend` does, and leave the attention to the caller."""
        start, count = self.seen, key.shape[2]
        if not self.crosses(count):
            filled = self.extend(key, value, query)
            size = compact_size(self.partitions, self.rule)
            compact = filled[0][:, :, :size], filled[1][:, :, :size]
            raw = filled[0][:, :, size:], filled[1][:, :, size:]
            return Seen(self._bare(compact), self._bare(raw), start, raw_start(self.partitions, self.rule))
        self.advance()
        buffer, offset = self._store_for(key, value), raw_start(self.partitions, self.rule)
        past = buffer.cut(compact_size(self.partitions, self.rule))
        raw = joined(past, (key, value)) if past[0].shape[2] else (key, value)
        queries = self._queries_with(query)
        self.seen += count
        recent = self._compress(buffer, raw, compressed_at(self.seen - 1, self.rule), queries)
        seen = Seen(self._bare(buffer.whole), self._bare(raw), start, offset)
        buffer.append(recent)
        return seen

    def _bare(self, pair: Pair) -> Pair:
        """Keys and values without the scores that travel with the keys."""
        return bare_keys(*pair, self.rule.compressor), pair[1]

    def crosses(self, count: int) -> bool:
        """Whether a compression falls between the first and the last of the next ``count`` tokens."""
        return compressed_at(self.seen, self.rule) != compressed_at(self.seen + count - 1, self.rule)

    def extend(self, key: Tensor, value: Tensor, query: Tensor | None = None) -> Pair:
        """Store N new tokens, between which nothing is compressed, and leave the attention to the caller.

        Only a compressor with a window needs their queries.

        Returns:
            Keys and values (B, H, stored, D), views of the buffer. The new tokens see all but their successors.
        """
        assert not self.crosses(key.shape[2])
        self.advance()
        buffer = self._store_for(key, value)
        buffer.append((key, value))
        self._remember(query)
        self.seen += key.shape[2]
        return buffer.filled

    @property
    def due(self) -> bool:
        """Whether something must be compressed before the next token attends."""
        return compressed_at(self.seen, self.rule) > self.partitions

    def advance(self) -> None:
        """Compress the partitions that the rule requires to be compressed before the next token attends."""
        if self.due:
            self.buffer.append(self._compress(self.buffer, *self._due()))

    def _due(self) -> tuple[Pair, int, Tensor | None]:
        """The raw pairs, cut from the buffer, the number of partitions to reach, and the stored queries."""
        raw = self.buffer.cut(compact_size(self.partitions, self.rule))
        queries = None if self._queries is None else self._queries.filled[0].clone()
        return raw, compressed_at(self.seen, self.rule), queries

    def most_stored(self, tokens: int) -> int:
        """The most rows that are filled at any time while ``tokens`` more arrive one by one."""
        if self.rule is KEEP_ALL and self._store is not None:
            # A system may have dropped some of those seen.
            return self.buffer.length + tokens
        return max((stored_size(self.seen + count, self.rule) for count in range(1, tokens + 1)), default=0)

    @property
    def position(self) -> int:
        """The position that the next token's query and key are stored with, once what is :attr:`due` is compressed."""
        return self.seen

    @property
    def query_place(self) -> int:
        """The row of the query buffer for the next token's query: the last row if the query is not needed."""
        if self._queries is None:
            return 0
        return self._queries.length if self._windows(self.seen, self.seen + 1) else self._queries.capacity - 1

    def count(self, tokens: int) -> None:
        """Count ``tokens`` new tokens that the caller has already written after the filled rows of the buffers."""
        if self._queries is not None:
            needed = self._windows(self.seen, self.seen + tokens)
            self._queries.length += sum(window.stop - window.start for window in needed)
        self.buffer.length += tokens
        self.seen += tokens

    def rows(self, indices: Tensor) -> KeyValueStream:
        """See :class:`Stream`."""
        other = KeyValueStream(self.rule, self.impl)
        other.seen, other.partitions, other._probed = self.seen, self.partitions, self._probed
        other._store = None if self._store is None else self._store.rows(indices)
        other._queries = None if self._queries is None else self._queries.rows(indices)
        return other

    def _windows(self, start: int, stop: int) -> list[slice]:
        """Slices of [start, stop), relative to ``start``, with the queries that later compressions need."""
        lag, window = self.rule.lag_size, self.rule.compressor.window
        first = window_start(self.partitions + 1, self.rule)
        # The first window that ends after ``start`` and is needed.
        first += max(0, start - first - window + lag) // lag * lag
        return [slice(max(at - start, 0), min(at + window, stop) - start) for at in range(first, stop, lag)]

    def _remember(self, query: Tensor | None) -> None:
        """Store the queries that later compressions need, out of those (B, Hq, N, D) of the next tokens."""
        if self.rule.compressor.window:
            assert query is not None
            rows = self._query_rows(query)
            for window in self._windows(self.seen, self.seen + query.shape[2]):
                rows.append((query[:, :, window],))

    def _queries_with(self, query: Tensor) -> Tensor | None:
        """Copies of the stored queries, followed by the next tokens' queries that compressions need."""
        if self.rule.compressor.window == 0:
            return None
        windows = self._windows(self.seen, self.seen + query.shape[2])
        return torch.cat([*self._query_rows(query).filled, *(query[:, :, window] for window in windows)], dim=2)

    def _query_rows(self, query: Tensor) -> RowBuffer[tuple[Tensor]]:
        """The buffer of queries; the first call makes it for queries like these."""
        if self._queries is None:
            self._queries = RowBuffer(query[:, :, :0])
        return self._queries

    def _store_for(self, key: Tensor, value: Tensor) -> PairBuffer:
        """The buffer of pairs; the first call makes it for pairs like these."""
        if self._store is None:
            self._store = PairBuffer(key[:, :, :0], value[:, :, :0])
        return self._store

    def _compress(self, buffer: PairBuffer, raw: Pair, partitions: int, queries: Tensor | None) -> Pair:
        """Append all partitions up to P = ``partitions`` to the compact rows; returns the tokens that stay raw.

        The compressor takes its windows from the queries (B, Hq, rows, D). The unused rest replaces the stored ones.
        """
        recent, given = self._begin(buffer, raw, partitions, queries)
        self._end(buffer, self._compact(*given), partitions)
        return recent

    def _begin(self, buffer: PairBuffer, raw: Pair, partitions: int, queries: Tensor | None) -> tuple[Pair, _Given]:
        """What :meth:`_compress` does before the compressor: the tokens that stay raw, and what the compressor gets."""
        (key, value), sink, before = raw, self.rule.sink_size, self.partitions
        dropped = raw_start(partitions, self.rule) - raw_start(before, self.rule)
        recent = key[:, :, dropped:], value[:, :, dropped:]
        buffer.reserve(compact_size(partitions, self.rule) + recent[0].shape[2])
        if before == 0:
            buffer.append((key[:, :, :sink], value[:, :, :sink]))
            key, value = key[:, :, sink:], value[:, :, sink:]
        count, windows = partitions - before, None
        if queries is not None:
            used = count * self.rule.compressor.window
            windows = queries[:, :, :used].unflatten(2, (count, -1)).unflatten(1, (key.shape[1], -1))
            self._query_rows(queries).length = 0
            self._query_rows(queries).append((queries[:, :, used:],))
        return recent, (key, value, count, windows)

    def _end(self, buffer: PairBuffer, compact: Pair, partitions: int) -> None:
        """Append what the compressor returned."""
        if self.rule.compressor.takes_scores:
            compact = without_scores(compact[0]), compact[1]
        buffer.append(compact)
        self.partitions = partitions

    def _compact(self, key: Tensor, value: Tensor, count: int, windows: Tensor | None) -> Pair:
        """Compress the next ``count`` partitions to keys and values (B, H, count K, D)."""
        run = implementation(self.impl, key)
        compact: Pair = run.compress(key, value, self.rule, count, self.partitions, windows)
        return compact


def advance_together(streams: Sequence[KeyValueStream]) -> None:
    """:meth:`KeyValueStream.advance` of due streams with one rule and equally many tokens, such as a row's layers.

    The compressor is called once for all: a call costs the host as much for many streams as for one.
    """
    alike = {(type(stream), stream.buffer.whole[0].shape[:2]) for stream in streams}
    if len(streams) == 1 or len(alike) > 1 or type(streams[0]) is not KeyValueStream:
        for stream in streams:
            stream.advance()
        return
    partitions = compressed_at(streams[0].seen, streams[0].rule)
    begun = [stream._begin(stream.buffer, *stream._due()) for stream in streams]
    keys, values, (count, *_), windows = zip(*(given for _, given in begun), strict=True)
    queries = None if windows[0] is None else torch.cat(windows)
    compact = streams[0]._compact(torch.cat(keys), torch.cat(values), count, queries)
    of_streams = zip(*(part.chunk(len(streams)) for part in compact), strict=True)
    for stream, (recent, _), (key, value) in zip(streams, begun, of_streams, strict=True):
        stream._end(stream.buffer, (key, value), partitions)
        stream.buffer.append(recent)
