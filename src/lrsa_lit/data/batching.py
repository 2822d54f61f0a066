"""Which examples stand together in a batch: pure functions of lengths, an order and a random generator.

An order is a list of positions in a data set, a batch one too. Nothing here reads an example.
"""

from __future__ import annotations

from collections.abc import Sequence

Batches = list[list[int]]


def chunks(order: Sequence[int], size: int) -> Batches:
    """Batches of ``size`` examples in the given order; the last may hold fewer."""
    return [list(order[start : start + size]) for start in range(0, len(order), size)]


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
        fullest = max(range(len(batches)), key=lambda position: len(batches[position]))
        batch = batches[fullest]
        batches[fullest : fullest + 1] = [batch[: len(batch) // 2], batch[len(batch) // 2 :]]
    return batches
