"""What the ranks that share a row exchange under a rule, and which rank compresses which partition: integers only.

Symbols: N ranks, S sink_size, L lag_size, K top_k, P(t) partitions compressed when the token at t attends.
"""

from __future__ import annotations

import bisect
import functools
import itertools
from dataclasses import dataclass
from typing import NamedTuple

from lrsa_lit.context_parallel.shares import Shares
from lrsa_lit.ops.sparse_attention import Rule, compressed_at, raw_start
from lrsa_lit.ops.sparse_attention.geometry import compact_size, partition_counts


class Piece(NamedTuple):
    """The part of a sequence that lies in one share.

    Attributes:
        sequence: number of the sequence in the row.
        start: position in the sequence of the part's first token.
        stop: position in the sequence after the part's last token.
        raw_from: position of the first raw token that the part's queries see; at most ``start``.
        first: the first partition whose reference ends in the part. The rank that holds the part compresses it.
        compresses: number of partitions that this rank compresses, from ``first`` on.
        partitions: number of partitions that are compressed at the end of the sequence.
    """

    sequence: int
    start: int
    stop: int
    raw_from: int
    first: int
    compresses: int
    partitions: int


class Move(NamedTuple):
    """Tokens [start, stop) of the row that one rank sends to a rank, another or itself, for the halo of a share."""

    sender: int
    receiver: int
    share: int
    start: int
    stop: int

    @property
    def size(self) -> int:
        """The number of tokens."""
        return self.stop - self.start


@dataclass(frozen=True)
class Exchange:
    """What one rank sends and receives for halos, in the order of the messages.

    Attributes:
        sent: slices of the rank's own tokens.
        outgoing: number of tokens sent to each rank.
        incoming: number of tokens received from each rank.
        halos: for each of the rank's two shares, the slices of the received tokens that form its halo, in order.
    """

    sent: list[slice]
    outgoing: list[int]
    incoming: list[int]
    halos: list[list[slice]]


@dataclass(frozen=True)
class Gather:
    """How the compact rows of all ranks are gathered: each rank gives those of its front share, then of its back share.

    Attributes:
        rows: number of rows that each rank gives, including padding; 0 if there is nothing to gather.
        parts: for each sequence that lies in several shares, the ranges [start, stop) of its rows in the gathered rows.
    """

    rows: int
    parts: dict[int, list[tuple[int, int]]]

    @property
    def order(self) -> list[tuple[int, int]]:
        """The ranges of all sequences, one sequence after the other."""
        return list(itertools.chain.from_iterable(self.parts.values()))

    @functools.cached_property
    def spans(self) -> dict[int, tuple[int, int]]:
        """The range of each sequence's rows after the rows are put into :attr:`order`."""
        sizes = [sum(stop - start for start, stop in parts) for parts in self.parts.values()]
        return dict(zip(self.parts, itertools.pairwise([0, *itertools.accumulate(sizes)]), strict=True))


class Plan:
    """Everything that the ranks exchange for a row under a rule.

    Args:
        shares: the shares of the row.
        rule: the rule. Its compressor does not matter.

    Attributes:
        pieces: the pieces of each share.
        halos: for each share, the tokens [start, stop) before it that its rank needs.
        moves: the messages for the halos, in the order in which ranks send and receive them.
        moves_any: whether any rank needs tokens of another one. Then all ranks take part in the exchange.
        gather: how the compact rows are gathered.
    """

    def __init__(self, shares: Shares, rule: Rule) -> None:
        self.shares, self.rule = shares, rule
        totals = partition_counts(shares.boundaries, rule)
        self.pieces = [self._pieces(*shares.span(share), totals) for share in range(2 * shares.ranks)]
        self.halos = [
            (start - pieces[0].start + pieces[0].raw_from, start)
            for pieces, start in zip(self.pieces, shares.cuts, strict=False)
        ]
        self.moves = sorted(self._moves())
        self.moves_any = any(move.sender != move.receiver for move in self.moves)
        self.gather = self._gather()

    def contributed(self, piece: Piece) -> int:
        """The number of compact rows made from a piece: its sinks, and K for each partition that it compresses."""
        sinks = self.rule.sink_size if piece.start == 0 and piece.partitions else 0
        return sinks + piece.compresses * self.rule.top_k

    def needed(self, piece: Piece) -> int:
        """The number of compact rows of its sequence that the queries of a piece see."""
        return compact_size(compressed_at(piece.stop - 1, self.rule), self.rule)

    def is_whole(self, piece: Piece) -> bool:
        """Whether the piece is a whole sequence."""
        boundaries = self.shares.boundaries
        return piece.stop - piece.start == boundaries[piece.sequence + 1] - boundaries[piece.sequence]

    def received(self, rank: int) -> tuple[int, int]:
        """The key-value pairs of one head that a rank receives from others: raw ones for halos, and compact ones.

        Compact pairs include padding. The backward pass returns a gradient for each pair.
        """
        halos = sum(move.size for move in self.moves if move.receiver == rank != move.sender)
        return halos, (self.shares.ranks - 1) * self.gather.rows

    def _pieces(self, start: int, stop: int, totals: list[int]) -> list[Piece]:
        """The pieces of the tokens [start, stop) of the row."""
        found = []
        for sequence in self.shares.sequences(start, stop):
            first, end = self.shares.boundaries[sequence : sequence + 2]
            span = max(start, first) - first, min(stop, end) - first
            found.append(self._piece(sequence, *span, totals[sequence]))
        return found

    def _piece(self, sequence: int, start: int, stop: int, partitions: int) -> Piece:
        """Partition p is compressed in the piece where its reference ends, at S + (p + 2) L."""
        sink, lag = self.rule.sink_size, self.rule.lag_size
        first = min(max((start - sink) // lag - 1, 0), partitions)
        end = min(max((stop - sink) // lag - 1, first), partitions)
        return Piece(
            sequence, start, stop, raw_start(compressed_at(start, self.rule), self.rule), first, end - first, partitions
        )

    def _moves(self) -> list[Move]:
        found = []
        holder, cuts = self.shares.holder, self.shares.cuts
        for share, (start, stop) in enumerate(self.halos):
            for other in range(bisect.bisect_right(cuts, start) - 1, share):
                begin, end = max(cuts[other], start), min(cuts[other + 1], stop)
                if begin < end:
                    found.append(Move(holder(other), holder(share), share, begin, end))
        return found

    def _gather(self) -> Gather:
        rows = [
            [(piece.sequence, self.contributed(piece)) for piece in pieces if not self.is_whole(piece)]
            for pieces in self.pieces
        ]
        sizes = [sum(size for _, size in of_share) for of_share in rows]
        ranks = range(self.shares.ranks)
        most = max(sum(sizes[share] for share in self.shares.of_rank(rank)) for rank in ranks)
        parts: dict[int, list[tuple[int, int]]] = {}
        for share, of_share in enumerate(rows):
            holder = self.shares.holder(share)
            start = holder * most + (0 if share == holder else sizes[holder])
            for sequence, size in of_share:
                if size:
                    parts.setdefault(sequence, []).append((start, start + size))
                start += size
        return Gather(most, parts)


@functools.lru_cache(maxsize=256)
def plan_of(shares: Shares, numbers: tuple[int, int, int, int]) -> Plan:
    """The plan of a rule with S, L, K and C."""
    return Plan(shares, Rule(*numbers))


@functools.lru_cache(maxsize=256)
def exchange_of(plan: Plan, rank: int) -> Exchange:
    """What a rank sends and receives under a plan."""
    cuts, before = plan.shares.cuts, 0
    own, came = plan.shares.of_rank(rank), [move for move in plan.moves if move.receiver == rank]
    sent = [move for move in plan.moves if move.sender == rank]
    # The place of a token among the rank's own tokens, minus its place in the row, in the second share.
    second = cuts[own[0] + 1] - cuts[own[0]] - cuts[own[1]]
    offsets = [second if move.start >= cuts[own[1]] else -cuts[own[0]] for move in sent]
    outgoing, incoming = ([0] * plan.shares.ranks for _ in range(2))
    halos: dict[int, list[tuple[int, slice]]] = {share: [] for share in own}
    for move in came:
        halos[move.share].append((move.start, slice(before, before + move.size)))
        incoming[move.sender] += move.size
        before += move.size
    for move in sent:
        outgoing[move.receiver] += move.size
    return Exchange(
        [slice(move.start + offset, move.stop + offset) for move, offset in zip(sent, offsets, strict=True)],
        outgoing,
        incoming,
        [[part for _, part in sorted(parts, key=lambda pair: pair[0])] for parts in halos.values()],
    )
