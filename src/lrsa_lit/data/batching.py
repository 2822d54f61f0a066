"""Which examples stand together in a batch: pure functions of lengths, an order and a random generator.

An order is a list of positions in a data set, and so is a batch. Nothing here reads an example.
"""

from __future__ import annotations

import random
from bisect import bisect_left, insort
from collections.abc import Sequence

Batches = list[list[int]]


def chunks(order: Sequence[int], size: int) -> Batches:
    """Batches of ``size`` examples in the given order; the last may hold fewer."""
    return [list(order[start : start + size]) for start in range(0, len(order), size)]


def sorted_in_windows(order: Sequence[int], lengths: Sequence[int], window: int) -> list[int]:
    """The order with each ``window`` examples of it sorted by length, longest first."""
    return [
        position
        for part in chunks(order, window)
        for position in sorted(part, key=lambda position: lengths[position], reverse=True)
    ]


def shuffled_in_groups(batches: Batches, size: int, rng: random.Random) -> Batches:
    """The batches in another order, in which each ``size`` of them from the first on stay together."""
    groups = [batches[start : start + size] for start in range(0, len(batches), size)]
    # An incomplete group stays last, or it would shift the ones behind it.
    last = [groups.pop()] if len(batches) % size else []
    rng.shuffle(groups)
    return [batch for group in groups + last for batch in group]


def best_fit_decreasing(order: Sequence[int], lengths: Sequence[int], budget: int) -> Batches:
    """Pack examples into bins: each, the longest first, goes where it leaves the least room.

    How many bins there are depends on the lengths alone; the order decides among examples of one length.

    Args:
        order: what to pack.
        lengths: tokens of each example, none above ``budget``.
        budget: tokens of a bin.
    """
    bins: Batches = []
    room: list[tuple[int, int]] = []  # what is left of a bin, and the bin, ascending
    for position in sorted(order, key=lambda position: lengths[position], reverse=True):
        place = bisect_left(room, (lengths[position], 0))
        if place == len(room):
            left, number = budget, len(bins)
            bins.append([])
        else:
            left, number = room.pop(place)
        bins[number].append(position)
        if left > lengths[position]:
            insort(room, (left - lengths[position], number))
    return bins


def packed_in_windows(order: Sequence[int], lengths: Sequence[int], budget: int, window: int) -> Batches:
    """Bins of at most ``budget`` tokens, each of examples that stand within about ``window`` tokens of the order."""
    bins: Batches = []
    part: list[int] = []
    tokens = 0
    for position in order:
        part.append(position)
        tokens += lengths[position]
        if tokens >= window:
            bins += best_fit_decreasing(part, lengths, budget)
            part, tokens = [], 0
    return bins + best_fit_decreasing(part, lengths, budget)


def batches_an_epoch(batches: int, examples: int, ranks: int) -> int:
    """How many batches an epoch has over all ranks, so that each rank gets as many.

    Args:
        batches: how many there would be for one rank.
        examples: of the epoch; no batch can have less than one.
        ranks: data-parallel processes.

    Returns:
        ``batches`` rounded up to a multiple of ``ranks``, or the examples rounded down to one where they are too few
        for that; 0 if there are fewer examples than ranks.
    """
    rounded_up = -(-batches // ranks) * ranks
    return min(rounded_up, examples // ranks * ranks)


def split_into(batches: Batches, count: int) -> Batches:
    """The same examples in exactly ``count`` batches, by halving the fullest ones; the last are dropped if too many.

    Args:
        batches: none of them empty.
        count: at most as many as there are examples.
    """
    batches = batches[:count]
    while len(batches) < count:
        fullest = max(range(len(batches)), key=lambda number: len(batches[number]))
        batch = batches[fullest]
        batches[fullest : fullest + 1] = [batch[: len(batch) // 2], batch[len(batch) // 2 :]]
    return batches
