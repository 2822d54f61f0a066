"""Exact attention to the first and the most recent tokens, computed in blocks to keep masks small.

Dimensions: B batch, H key-value heads, Hq query heads, G query heads per key-value head, N queries, T tokens, D
head_dim, S sinks, R recent tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from lrsa_lit.ops.sdpa import sdpa
from lrsa_lit.ops.sparse_attention import Stream, attended_pairs, dense_attention
from lrsa_lit.ops.sparse_attention.buffer import Pair, joined


def streaming_attention(query: Tensor, key: Tensor, value: Tensor, sink: int, recent: int, scale: float) -> Tensor:
    """Query i sees keys j <= i with j < S or i - j < R.

    Args:
        query: (B, Hq, N, D), the last N of T tokens.
        key: (B, H, T, D).
        value: (B, H, T, D).
        sink: S >= 0.
        recent: R >= 1, the query's own token among them.
        scale: factor of the scores.

    Returns:
        (B, Hq, N, D).
    """
    tokens, full = key.shape[2], sink + recent
    first, outputs = tokens - query.shape[2], []
    # The first S + R queries see everything before them.
    if first < full:
        stop = min(full, tokens)
        early = dense_attention(query[:, :, : stop - first], key[:, :, :stop], value[:, :, :stop], scale=scale)
        outputs.append(early)
    if tokens > full:
        start = max(first, full)
        sinks = key[:, :, :sink], value[:, :, :sink]
        raw = key[:, :, start - recent :], value[:, :, start - recent :]
        outputs.append(_in_blocks(query[:, :, start - first :], sinks, raw, recent, scale))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)


def streaming_pairs(length: int, sink: int, recent: int) -> int:
    """Query-key pairs of a head over ``length`` tokens."""
    seen = min(length, sink + recent)
    return attended_pairs(seen, None) + (length - seen) * (sink + recent)


def _in_blocks(query: Tensor, sinks: Pair, raw: Pair, recent: int, scale: float) -> Tensor:
    """Attention of N queries that see all sinks; raw keys and values (B, H, R + N, D) start R before the queries."""
    (batch, heads), count = raw[0].shape[:2], query.shape[2]
    block = min(recent, count)
    missing = -count % block
    queries = pad(query, (0, 0, 0, missing)).unflatten(1, (heads, -1)).unflatten(3, (-1, block))
    rows = queries.permute(0, 3, 1, 2, 4, 5).flatten(3, 4).flatten(0, 1)  # (B blocks, H, G block, D)
    keys, values = (_beside_sinks(*parts, recent, block, missing) for parts in zip(sinks, raw, strict=True))
    place, seen = (torch.arange(size, device=query.device) for size in (block, recent + block))
    visible = (seen > place[:, None]) & (seen <= place[:, None] + recent)
    visible = pad(visible, (sinks[0].shape[2], 0), value=True).repeat(queries.shape[2], 1)
    output = sdpa(rows, keys, values, mask=visible, scale=scale)
    blocks = (
        output.unflatten(0, (batch, -1)).unflatten(3, (-1, block)).permute(0, 2, 3, 1, 4, 5)
    )  # (B, H, G, blocks, …)
    found: Tensor = blocks.flatten(3, 4).flatten(1, 2)[:, :, :count]
    return found


def _beside_sinks(sinks: Tensor, raw: Tensor, recent: int, block: int, missing: int) -> Tensor:
    """The keys or values that the queries of each block see: (B blocks, H, S + R + block, D)."""
    windows = pad(raw, (0, 0, 0, missing)).unfold(2, recent + block, block).permute(0, 2, 1, 4, 3)
    repeated = sinks[:, None].expand(-1, windows.shape[1], -1, -1, -1)
    return torch.cat([repeated, windows], dim=3).flatten(0, 1)


class StreamingHeads(Stream):
    """Sinks and recent pairs, at their original positions, for heads that see only these."""

    def __init__(self, sink: int, recent: int) -> None:
        self.sink, self.recent = sink, recent
        self.seen = 0
        self._pair: Pair | None = None

    @property
    def stored(self) -> Pair | None:
        """At most S + R pairs."""
        return self._pair

    @property
    def attended_pairs(self) -> float:
        """See :class:`Stream`."""
        return streaming_pairs(self.seen, self.sink, self.recent)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """See :class:`Stream`."""
        pair = (key, value) if self._pair is None else joined(self._pair, (key, value))
        sinks, raw = ((pair[0][:, :, part], pair[1][:, :, part]) for part in self._parts)
        if self.seen < self.sink + self.recent:
            output = streaming_attention(query, *pair, self.sink, self.recent, scale)
        else:
            output = _in_blocks(query, sinks, raw, self.recent, scale)
        self.seen += key.shape[2]
        last = raw[0][:, :, -self.recent :], raw[1][:, :, -self.recent :]
        # A copy, so that the dropped pairs are freed.
        self._pair = joined(sinks, last)
        return output

    @property
    def _parts(self) -> tuple[slice, slice]:
        return slice(0, self.sink), slice(self.sink, None)

    def rows(self, indices: Tensor) -> StreamingHeads:
        """See :class:`Stream`."""
        other = StreamingHeads(self.sink, self.recent)
        other.seen = self.seen
        other._pair = None if self._pair is None else (self._pair[0][indices], self._pair[1][indices])
        return other
