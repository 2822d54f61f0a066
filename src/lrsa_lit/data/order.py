"""The examples of an epoch, in random order: those of one data set, or shares of several."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TypeAlias

Key = dict[str, str | int | float | bool | None]
"""What decides batches, by the names that a user knows it by."""


@dataclass(frozen=True)
class Shuffled:
    """All examples of one data set, of which there are so many."""

    examples: int

    def __call__(self, seed: int, epoch: int) -> list[int]:
        """Each position once."""
        return _shuffled(range(self.examples), f"{seed}:{epoch}")

    def key(self) -> Key:
        """Nothing but the number of examples, which is known anyway."""
        return {}


@dataclass(frozen=True)
class Mixed:
    """Fixed shares of several data sets that lie one behind the other.

    Each is gone through again and again, in another order each time, so that no example comes a second time before all
    ``counts`` of its data set have come once; an epoch takes the next ``quotas`` of each. All are at least one.
    """

    counts: tuple[int, ...]
    quotas: tuple[int, ...]

    def __call__(self, seed: int, epoch: int) -> list[int]:
        """The quotas of all data sets, mixed."""
        starts = accumulate(self.counts, initial=0)
        drawn = [
            start + position
            for number, (start, count, quota) in enumerate(zip(starts, self.counts, self.quotas, strict=False))
            for position in _cycle(count, epoch * quota, quota, f"{seed}:{number}")
        ]
        return _shuffled(drawn, f"{seed}:{epoch}")

    def key(self) -> Key:
        """The quotas."""
        return {"examples of each data set in an epoch": ", ".join(map(str, self.quotas))}


Order: TypeAlias = Shuffled | Mixed
"""Decides which examples an epoch has, as many in every epoch, from the run's seed and the epoch's number."""


def shares(weights: Sequence[float], total: int) -> tuple[int, ...]:
    """Whole numbers in the proportion of the weights that add up to ``total``, by the largest remainder."""
    exact = [total * weight / sum(weights) for weight in weights]
    parts = [int(part) for part in exact]
    by_remainder = sorted(range(len(parts)), key=lambda number: parts[number] - exact[number])
    for number in by_remainder[: total - sum(parts)]:
        parts[number] += 1
    return tuple(parts)


def _cycle(count: int, start: int, length: int, seed: str) -> Iterator[int]:
    """``length`` positions from ``start`` on of all ``count`` in random order, again and again."""
    stop = start + length
    for turn in range(start // count, -(-stop // count)):
        positions = _shuffled(range(count), f"{seed}:{turn}")
        yield from positions[max(start - turn * count, 0) : stop - turn * count]


def _shuffled(positions: Sequence[int], seed: str) -> list[int]:
    shuffled = list(positions)
    random.Random(seed).shuffle(shuffled)
    return shuffled
