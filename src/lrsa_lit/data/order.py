"""The examples of an epoch in random order: of one data set, or shares of several data sets."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TypeAlias

Key = dict[str, str | int | float | bool | None]
"""The settings that decide the batches, by the names that users know."""


@dataclass(frozen=True)
class Shuffled:
    """All ``examples`` examples of one data set."""

    examples: int

    def __call__(self, seed: int, epoch: int) -> list[int]:
        """Each position once, in random order."""
        return _shuffled(range(self.examples), f"{seed}:{epoch}")

    def key(self) -> Key:
        """Empty: the number of examples is part of the plan's key already."""
        return {}


@dataclass(frozen=True)
class Mixed:
    """Fixed shares of several concatenated data sets.

    Each data set is iterated repeatedly, in a new order each time, so no example repeats before all others of its data
    set have come. An epoch takes the next ``quotas`` examples of each data set. ``counts`` are the sizes of the data
    sets. All numbers are at least 1.
    """

    counts: tuple[int, ...]
    quotas: tuple[int, ...]

    def __call__(self, seed: int, epoch: int) -> list[int]:
        """The next quota of each data set, shuffled together."""
        starts = accumulate(self.counts, initial=0)
        drawn = [
            start + position
            for number, (start, count, quota) in enumerate(zip(starts, self.counts, self.quotas, strict=False))
            for position in _cycle(count, epoch * quota, quota, f"{seed}:{number}")
        ]
        return _shuffled(drawn, f"{seed}:{epoch}")

    def key(self) -> Key:
        """The quotas, in the order of the data sets."""
        return {"examples of each data set in an epoch": ", ".join(map(str, self.quotas))}


Order: TypeAlias = Shuffled | Mixed
"""Decides an epoch's examples from the run's seed and the epoch's number; every epoch has equally many."""


def shares(weights: Sequence[float], total: int) -> tuple[int, ...]:
    """Integers proportional to the weights that add up to ``total``, by the largest-remainder method."""
    exact = [total * weight / sum(weights) for weight in weights]
    parts = [int(part) for part in exact]
    by_remainder = sorted(range(len(parts)), key=lambda number: parts[number] - exact[number])
    for number in by_remainder[: total - sum(parts)]:
        parts[number] += 1
    return tuple(parts)


def _cycle(count: int, start: int, length: int, seed: str) -> Iterator[int]:
    """``length`` positions from ``start`` on in an endless sequence of random permutations of ``count`` positions."""
    stop = start + length
    for turn in range(start // count, -(-stop // count)):
        positions = _shuffled(range(count), f"{seed}:{turn}")
        yield from positions[max(start - turn * count, 0) : stop - turn * count]


def _shuffled(positions: Sequence[int], seed: str) -> list[int]:
    shuffled = list(positions)
    random.Random(seed).shuffle(shuffled)
    return shuffled
