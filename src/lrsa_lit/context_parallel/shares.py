"""Which tokens of a row each rank holds: integers only.

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

    Rank r holds the shares r and 2N - 1 - r. The later a token is, the more keys it sees, so a share from the front and
    one from the back make equal work.

    Args:
        boundaries: where the sequences start, and the length of the row: 0 … T.
        cuts: where the shares start, and the length of the row: 2N + 1 numbers, ascending.
    """

    boundaries: tuple[int, ...]
    cuts: tuple[int, ...]

    @classmethod
    def cut(cls, boundaries: Sequence[int], ranks: int, rule: Rule) -> Shares:
        """Shares of about T / 2N tokens, each of which ends where a partition or a sequence does.

        So each partition is in one share, whose holder needs no more of the one before than its queries see.

        Raises:
            UserError: the row is too short for that.
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
        """The two shares of a rank, the one from the front first."""
        return rank, 2 * self.ranks - 1 - rank

    def holder(self, share: int) -> int:
        """The rank that holds a share."""
        return min(share, 2 * self.ranks - 1 - share)

    def span(self, share: int) -> tuple[int, int]:
        """The tokens [start, stop) of a share."""
        return self.cuts[share], self.cuts[share + 1]

    def spans(self, rank: int) -> list[tuple[int, int]]:
        """Those of a rank's two shares, in the order in which it holds them."""
        return [self.span(share) for share in self.of_rank(rank)]

    def sequences(self, start: int, stop: int) -> range:
        """The numbers of the sequences that have some of the tokens [start, stop)."""
        return range(bisect.bisect_right(self.boundaries, start) - 1, bisect.bisect_left(self.boundaries, stop))

    def positions(self, rank: int) -> Numbers:
        """(Tr,) the position, in its sequence, of each token that a rank holds."""
        return np.concatenate(
            [
                np.arange(max(start, self.boundaries[number]), min(stop, self.boundaries[number + 1]))
                - self.boundaries[number]
                for start, stop in self.spans(rank)
                for number in self.sequences(start, stop)
            ]
        )

    def held(self, places: Numbers, rank: int) -> tuple[Flags, Numbers]:
        """Of places in rows of T tokens that follow each other, which a rank holds, and where among its own tokens.

        Args:
            places: (M,), row T + column.
            rank: the rank.

        Returns:
            (M,) bool, and in the same order the places row Tr + column, in rows of its Tr tokens, of those it holds.
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
    """The fewest tokens of a row that so many ranks can share: two partitions, or twice the sinks, for each."""
    return 2 * ranks * max(rule.lag_size, rule.sink_size)


def too_short(length: int, ranks: int, rule: Rule, what: str) -> UserError:
    """The complaint of a row of so many tokens, ``what`` of which they are."""
    reason = f"rows need {shortest_row(ranks, rule)} tokens, two partitions for each device, and {what} {length}"
    hint = "pack examples (data.init_args.packing), pad them (data.init_args.pad_to_longest), or share with fewer"
    return UserError("context", ranks, reason=reason, hint=hint)


def _nearest_end(place: float, boundaries: Sequence[int], rule: Rule) -> int:
    """The end of a sequence, its sinks or a partition that is nearest to a place; of two the earlier."""
    start, stop = next(pair for pair in itertools.pairwise(boundaries) if pair[1] > place)
    first, lag = start + rule.sink_size, rule.lag_size
    before = first + int((place - first) // lag) * lag
    ends = [start, *(each for each in (first, before, before + lag) if first <= each < stop), stop]
    return min(ends, key=lambda end: (abs(end - place), end))
