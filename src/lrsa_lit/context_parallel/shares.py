"""Which tokens of a row each rank holds; pure integer arithmetic.

Symbols: N ranks, T tokens of a row, S sink_size, L lag_size.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lrsa_lit.errors import UserError
from lrsa_lit.ops.sparse_attention import Rule

Numbers = np.ndarray[tuple[Any, ...], np.dtype[np.int64]]
Flags = np.ndarray[tuple[Any, ...], np.dtype[np.bool_]]


@dataclass(frozen=True)
class Shares:
    """A row of packed sequences, cut into 2N shares of consecutive tokens.

    Rank r holds the shares r and 2N - 1 - r. Later tokens see more keys, so one share from the front and one from the
    back give all ranks about the same work.

    Args:
        boundaries: where the sequences start, and the length of the row: 0 … T.
        cuts: where the shares start, and the length of the row: 2N + 1 ascending numbers.
    """

    boundaries: tuple[int, ...]
    cuts: tuple[int, ...]

    @classmethod
    def cut(cls, boundaries: Sequence[int], ranks: int, rule: Rule) -> Shares:
        """Cut a row into shares of about T / 2N tokens. Each share ends at the end of sinks, a partition or a sequence.

        So each partition is in a single share, and its rank needs only those earlier pairs that its queries see.

        Raises:
            UserError: the row is too short.
        """
        length, count = boundaries[-1], 2 * ranks
        if length < shortest_row(ranks, rule):
            raise too_short(length, ranks, rule, "one has")
        inner = [_nearest_end(length * share / count, boundaries, rule) for share in range(1, count)]
        return cls(tuple(boundaries), (0, *inner, length))

    @property
    def ranks(self) -> int:
        """N."""
        return len(self.cuts) // 2

    def of_rank(self, rank: int) -> tuple[int, int]:
        """The indices of a rank's two shares; the front share is first."""
        return rank, 2 * self.ranks - 1 - rank

    def holder(self, share: int) -> int:
        """The rank that holds a share."""
        return min(share, 2 * self.ranks - 1 - share)

    def span(self, share: int) -> tuple[int, int]:
        """The tokens [start, stop) of a share."""
        return self.cuts[share], self.cuts[share + 1]

    def spans(self, rank: int) -> list[tuple[int, int]]:
        """The tokens [start, stop) of a rank's two shares, in the order in which it holds them."""
        return [self.span(share) for share in self.of_rank(rank)]

    def sequences(self, start: int, stop: int) -> range:
        """The indices of the sequences that overlap the tokens [start, stop)."""
        return range(bisect.bisect_right(self.boundaries, start) - 1, bisect.bisect_left(self.boundaries, stop))

    def positions(self, rank: int) -> Numbers:
        """(Tr,) the position in its sequence of each token that a rank holds."""
        return np.concatenate(
            [
                np.arange(max(start, self.boundaries[number]), min(stop, self.boundaries[number + 1]))
                - self.boundaries[number]
                for start, stop in self.spans(rank)
                for number in self.sequences(start, stop)
            ]
        )

    def held(self, places: Numbers, rank: int) -> tuple[Flags, Numbers]:
        """Which of some tokens a rank holds, and their indices among its own tokens.

        Args:
            places: (M,) flat indices into rows of T tokens: row * T + column.
            rank: the rank.

        Returns:
            (M,) bool, whether the rank holds each token; and the indices row * Tr + own column of the held ones, in the
            same order.
        """
        rows, columns = np.divmod(places, self.cuts[-1])
        spans = self.spans(rank)
        width, before = sum(stop - start for start, stop in spans), 0
        own = np.full(len(places), -1, dtype=np.int64)
        for start, stop in spans:
            here = (columns >= start) & (columns < stop)
            own[here] = (rows * width + before + columns - start)[here]
            before += stop - start
        return own >= 0, own[own >= 0]


def shortest_row(ranks: int, rule: Rule) -> int:
    """The fewest tokens of a row that ``ranks`` ranks can share: for each, two partitions or twice the sinks."""
    return 2 * ranks * max(rule.lag_size, rule.sink_size)


def too_short(length: int, ranks: int, rule: Rule, what: str) -> UserError:
    """The error for rows of ``length`` tokens; ``what`` begins the clause that tells the length, such as "one has"."""
    reason = f"devices need rows of {shortest_row(ranks, rule)} tokens, two partitions each, and {what} {length}"
    hint = "pack examples (data.init_args.packing), pad them (data.init_args.pad_to_longest), or use fewer devices"
    return UserError("context", ranks, reason=reason, hint=hint)


def _nearest_end(place: float, boundaries: Sequence[int], rule: Rule) -> int:
    """The end of a sequence, of its sinks or of a partition that is nearest to ``place``; the earlier one of two."""
    start, stop = next(pair for pair in itertools.pairwise(boundaries) if pair[1] > place)
    first, lag = start + rule.sink_size, rule.lag_size
    before = first + int((place - first) // lag) * lag
    ends = [start, *(each for each in (first, before, before + lag) if first <= each < stop), stop]
    return min(ends, key=lambda end: (abs(end - place), end))
