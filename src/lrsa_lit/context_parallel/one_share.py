"""What a rank computes for one of its shares: compressed partitions, and the attention of the share's queries.

Dimensions: B batch, H key-value heads, Hq query heads, G = Hq / H, Ts tokens of the share, Th tokens of the halo,
D head_dim, w window of the compressor.
"""

from __future__ import annotations

from collections.abc import Sequence
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
        plan: the plan of the row.
        share: index of the share.
        query: (B, Hq, Ts, D).
        key: (B, H, Th + Ts, D), with token scores if the compressor takes scores.
        value: (B, H, Th + Ts, D).
        rule: the rule.
        impl: the implementation of the operator.
    """

    plan: Plan
    share: int
    query: Tensor
    key: Tensor
    value: Tensor
    rule: Rule
    impl: Impl

    def compressed(self) -> Tensor:
        """The compact rows (B, H, rows, 2 D) that all ranks gather: keys next to values, one piece after the other."""
        parts = [self._compact(piece) for piece in self.parts]
        key, value = joined((self._bare[:, :, :0], self.value[:, :, :0]), *parts)
        return torch.cat([key, value], dim=-1)

    @property
    def parts(self) -> list[Piece]:
        """The pieces that are only a part of their sequence."""
        return [piece for piece in self._pieces if not self.plan.is_whole(piece)]

    def attend_parts(self, compact: Tensor, heads: slice, scale: float) -> list[Tensor]:
        """The attention (B, h Hq / H, tokens, D) of each of the ``parts`` in h adjacent key-value heads.

        Args:
            compact: (B, h, rows, 2 D), the compact rows of all shares.
            heads: which key-value heads.
            scale: factor of the attention logits.
        """
        return [self._attend(piece, compact, heads, scale) for piece in self.parts]

    def attend_whole(self, scale: float) -> Tensor:
        """The attention (B, Hq, tokens, D) of the sequences that are entirely in the share; they are adjacent."""
        pieces = [piece for piece in self._pieces if self.plan.is_whole(piece)]
        if not pieces:
            return self.query[:, :, :0]
        raw = slice(self._raw(pieces[0], 0).start, self._raw(pieces[-1], 0).stop)
        place, start = self._place(pieces[0]), self.plan.shares.boundaries[pieces[0].sequence]
        query = self.query[:, :, place : place + raw.stop - raw.start]
        boundaries = [0, *(self.plan.shares.boundaries[piece.sequence + 1] - start for piece in pieces)]
        key, value = self.key[:, :, raw], self.value[:, :, raw]
        selection = select(key, value, self.rule, boundaries) if self.rule.compressor.takes_scores else None
        output: Tensor = implementation(self.impl, query).forward(
            query, self._bare[:, :, raw], value, self.rule, boundaries=boundaries, scale=scale, selection=selection
        )
        return output

    def joined(self, whole: Tensor, parts: Sequence[Tensor]) -> Tensor:
        """Join the outputs of whole sequences with those of the parts before and after them: (B, Hq, Ts, D)."""
        before = sum(1 for piece in self.parts if piece.start > 0)
        return torch.cat([*parts[:before], whole, *parts[before:]], dim=2)

    @property
    def _pieces(self) -> Sequence[Piece]:
        return self.plan.pieces[self.share]

    @cached_property
    def _bare(self) -> Tensor:
        return bare_keys(self.key, self.value, self.rule.compressor)

    def _place(self, piece: Piece) -> int:
        """The index of the piece's first query in the share. Keys have the halo in front."""
        return self.plan.shares.boundaries[piece.sequence] + piece.start - self.plan.shares.cuts[self.share]

    def _raw(self, piece: Piece, start: int) -> slice:
        """The piece's raw pairs from position ``start`` of its sequence on, as indices of the keys."""
        halo = self.key.shape[2] - self.query.shape[2]
        zero = halo + self._place(piece) - piece.start
        return slice(zero + start, zero + piece.stop)

    def _queries(self, piece: Piece) -> Tensor:
        place = self._place(piece)
        return self.query[:, :, place : place + piece.stop - piece.start]

    def _compact(self, piece: Piece) -> Pair:
        """The piece's sinks, if it has any, and the pairs kept from the partitions that it compresses."""
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
        """The last queries (B, H, G, P, w, D) of each partition's reference; the references end in the piece."""
        if not self.rule.compressor.window:
            return None
        queries = self._queries(piece)[:, :, window_start(piece.first + 1, self.rule) - piece.start :]
        windows = queries.unfold(2, self.rule.compressor.window, self.rule.lag_size)[:, :, : piece.compresses]
        grouped: Tensor = windows.transpose(-1, -2).unflatten(1, (self.key.shape[1], -1))
        return grouped

    def _attend(self, piece: Piece, compact: Tensor, heads: slice, scale: float) -> Tensor:
        raw, group = self._raw(piece, piece.raw_from), self.query.shape[1] // self.key.shape[1]
        start, _ = self.plan.gather.spans.get(piece.sequence, (0, 0))
        seen_key, seen_value = compact[:, :, start : start + self.plan.needed(piece)].chunk(2, dim=-1)
        output: Tensor = implementation(self.impl, self.query).attend(
            self._queries(piece)[:, heads.start * group : heads.stop * group],
            (seen_key, seen_value),
            (self._bare[:, heads, raw], self.value[:, heads, raw]),
            self.rule,
            scale=scale,
            query_offset=piece.start,
            raw_offset=piece.raw_from,
        )
        return output
