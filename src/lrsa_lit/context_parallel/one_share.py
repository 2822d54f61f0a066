"""What the holder of a share does by itself: compress partitions, and let its queries attend.

Dimensions: B batch, H key-value heads, Hq query heads, G of each key-value head, Ts tokens of the share, Th of the
halo, D head_dim, w window of the compressor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lrsa_lit.context_parallel.share_plan import Piece, Plan
from lrsa_lit.ops.sparse_attention import Impl, Rule, bare_keys, implementation
from lrsa_lit.ops.sparse_attention.buffer import Pair, joined
from lrsa_lit.ops.sparse_attention.geometry import window_start
from lrsa_lit.ops.sparse_attention.selection import select


@dataclass(frozen=True)
class OneShare:
    """A share and the halo before it, in one layer.

    Args:
        plan: of the row.
        share: which one it is.
        query: (B, Hq, Ts, D).
        key: (B, H, Th + Ts, D), with what travels with keys.
        value: (B, H, Th + Ts, D).
        rule: the rule.
        impl: implementation of the operator.
    """

    plan: Plan
    share: int
    query: Tensor
    key: Tensor
    value: Tensor
    rule: Rule
    impl: Impl

    def compressed(self) -> Tensor:
        """The compact rows (B, H, rows, 2 D) that it gives to all: keys beside values, one piece after the other."""
        parts = [self._compact(piece) for piece in self._pieces if not self.plan.is_whole(piece)]
        key, value = joined((self._bare[:, :, :0], self.value[:, :, :0]), *parts)
        return torch.cat([key, value], dim=-1)

    def attend(self, compact_of: Callable[[int], Pair], scale: float) -> Tensor:
        """The attention (B, Hq, Ts, D) of its queries.

        Args:
            compact_of: the compact pairs (B, H, rows, D) of a sequence that other shares have parts of, up to those
                that this one makes.
            scale: factor of the scores before the softmax.
        """
        outputs, whole = [], [piece for piece in self._pieces if self.plan.is_whole(piece)]
        for piece in self._pieces:
            if piece not in whole:
                outputs.append(self._attend(piece, compact_of(piece.sequence), scale))
            elif piece == whole[0]:
                outputs.append(self._attend_whole(whole, scale))
        return torch.cat(outputs, dim=2)

    @property
    def _pieces(self) -> Sequence[Piece]:
        return self.plan.pieces[self.share]

    @cached_property
    def _bare(self) -> Tensor:
        return bare_keys(self.key, self.value, self.rule.compressor)

    def _place(self, piece: Piece) -> int:
        """Where the piece starts among the queries; its keys stand behind those of the halo."""
        return self.plan.shares.boundaries[piece.sequence] + piece.start - self.plan.shares.cuts[self.share]

    def _raw(self, piece: Piece, start: int) -> slice:
        """Its raw pairs from a position of its sequence on."""
        halo = self.key.shape[2] - self.query.shape[2]
        zero = halo + self._place(piece) - piece.start
        return slice(zero + start, zero + piece.stop)

    def _queries(self, piece: Piece) -> Tensor:
        place = self._place(piece)
        return self.query[:, :, place : place + piece.stop - piece.start]

    def _compact(self, piece: Piece) -> Pair:
        """Its sinks, if it has some, and what the partitions become that it compresses."""
        sink = self.rule.sink_size if piece.start == 0 and piece.partitions else 0
        sinks = self._raw(piece, 0).start if sink else 0
        rows = slice(sinks, sinks + sink)
        head = self._bare[:, :, rows], self.value[:, :, rows]
        if not piece.compresses:
            return head
        raw = self._raw(piece, self.rule.sink_size + piece.first * self.rule.lag_size)
        compress = implementation(self.impl, self.query).compress
        key, value = self.key[:, :, raw], self.value[:, :, raw]
        kept: Pair = compress(key, value, self.rule, piece.compresses, piece.first, self._windows(piece))
        return joined(head, kept)

    def _windows(self, piece: Piece) -> Tensor | None:
        """The last queries (B, H, G, count, w, D) of each reference, all of which are in the piece."""
        if not self.rule.compressor.window:
            return None
        queries = self._queries(piece)[:, :, window_start(piece.first + 1, self.rule) - piece.start :]
        windows = queries.unfold(2, self.rule.compressor.window, self.rule.lag_size)[:, :, : piece.compresses]
        grouped: Tensor = windows.transpose(-1, -2).unflatten(1, (self.key.shape[1], -1))
        return grouped

    def _attend(self, piece: Piece, compact: Pair, scale: float) -> Tensor:
        raw, rows = self._raw(piece, piece.raw_from), self.plan.needed(piece)
        output: Tensor = implementation(self.impl, self.query).attend(
            self._queries(piece),
            (compact[0][:, :, :rows], compact[1][:, :, :rows]),
            (self._bare[:, :, raw], self.value[:, :, raw]),
            self.rule,
            scale=scale,
            query_offset=piece.start,
            raw_offset=piece.raw_from,
        )
        return output

    def _attend_whole(self, pieces: Sequence[Piece], scale: float) -> Tensor:
        """That of sequences none of which has a part elsewhere; they follow each other."""
        first, last = pieces[0], pieces[-1]
        raw = slice(self._raw(first, 0).start, self._raw(last, 0).stop)
        place = self._place(first)
        query = self.query[:, :, place : place + raw.stop - raw.start]
        start = self.plan.shares.boundaries[first.sequence]
        boundaries = [0, *(self.plan.shares.boundaries[piece.sequence + 1] - start for piece in pieces)]
        key, value = self.key[:, :, raw], self.value[:, :, raw]
        selection = select(key, value, self.rule, boundaries) if self.rule.compressor.takes_scores else None
        output: Tensor = implementation(self.impl, query).forward(
            query, self._bare[:, :, raw], value, self.rule, boundaries=boundaries, scale=scale, selection=selection
        )
        return output
