"""How examples are put together: so many to a batch, similar lengths to a batch, or packed into one sequence.

An order is a list of positions in a data set, and so is a batch. Nothing here reads an example.
"""

from __future__ import annotations

import random
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from lrsa_lit.data.order import Key
from lrsa_lit.errors import UserError

Batches = list[list[int]]

# Sorting or packing more at once wastes less and mixes less. HF's Trainer sorts as many batches at a time.
_WINDOW = 50
# What the length of batches of one length is a multiple of.
_MULTIPLE = 64


@dataclass(frozen=True)
class FixedSize:
    """So many examples to a batch, padded to the longest of it.

    Attributes:
        size: examples in a batch.
        by_length: put examples of similar lengths together, among those that are near each other in the order; the
            batches of one step, over all ranks, are similar as well.
        to_longest: pad all batches to the longest example of all.
    """

    size: int
    by_length: bool = False
    to_longest: bool = False

    def count(self, order: Sequence[int], lengths: Sequence[int]) -> int:
        """How many batches suffice for the examples of an order, however it is shuffled: all full, but the last."""
        return -(-len(order) // self.size)

    def enough(self, order: Sequence[int], lengths: Sequence[int], count: int) -> int:
        """How many examples from the front of the order fill ``count`` batches; more than there are if none do."""
        return count * self.size

    def batches(
        self, order: Sequence[int], lengths: Sequence[int], count: int, ranks: int, rng: random.Random
    ) -> Batches:
        """Exactly ``count`` batches of an order that holds as many examples at least; what is too much is left out."""
        order = order[: count * self.size]
        if not self.by_length:
            return split_into(_chunks(order, self.size), count)
        order = [
            position
            for window in _chunks(order, _WINDOW * self.size * ranks)
            for position in _longest_first(window, lengths)
        ]
        return _shuffled_in_groups(split_into(_chunks(order, self.size), count), ranks, rng)

    def check(self, lengths: Sequence[int]) -> None:
        """Any length will do."""

    def row_length(self, lengths: Sequence[int]) -> int:
        """How many columns a batch has at least."""
        return -(-max(lengths) // _MULTIPLE) * _MULTIPLE if self.to_longest else 0

    def padding(self, batches: Batches, lengths: Sequence[int]) -> float:
        """The share of the batches' tokens that is no token of an example, in [0, 1)."""
        rows = [[lengths[position] for position in batch] for batch in batches]
        least = self.row_length(lengths)
        return 1 - sum(map(sum, rows)) / sum(len(row) * max(least, *row) for row in rows)

    def key(self) -> Key:
        """What decides the batches, in the words of the YAML."""
        return {"data.init_args.batch_size": self.size, "data.init_args.group_by_length": self.by_length}


@dataclass(frozen=True)
class Packed:
    """Several examples in one sequence of at most so many ``tokens``; nothing is cut, and nothing padded."""

    tokens: int

    def count(self, order: Sequence[int], lengths: Sequence[int]) -> int:
        """As many as this order takes, and not fewer than packing everything at once takes."""
        in_windows = self._in_windows(order, lengths, _WINDOW * self.tokens)
        return max(len(in_windows), len(best_fit_decreasing(order, lengths, self.tokens)))

    def enough(self, order: Sequence[int], lengths: Sequence[int], count: int) -> int:
        """As if sequences could be filled to the last token, so that ``count`` of them are got from it."""
        tokens = 0
        for number, position in enumerate(order, start=1):
            tokens += lengths[position]
            if tokens >= count * self.tokens:
                return number
        return len(order) + 1

    def batches(
        self, order: Sequence[int], lengths: Sequence[int], count: int, ranks: int, rng: random.Random
    ) -> Batches:
        """Packed in windows of the order, as much larger ones as it takes to get along with ``count`` sequences."""
        window, everything = _WINDOW * self.tokens, sum(lengths[position] for position in order)
        batches = self._in_windows(order, lengths, window)
        while len(batches) > count and window < everything:
            window *= 2
            batches = self._in_windows(order, lengths, window)
        rng.shuffle(batches)
        return split_into(batches, count)

    def check(self, lengths: Sequence[int]) -> None:
        """Raise a UserError if the longest example does not fit into a sequence."""
        if (longest := max(lengths)) > self.tokens:
            allowed = f"{longest} or more, as the longest training example has so many tokens and is not cut"
            raise UserError("packing.tokens", self.tokens, allowed, hint="or lower max_tokens")

    def padding(self, batches: Batches, lengths: Sequence[int]) -> float:
        """The unused share of the budget."""
        used = sum(lengths[position] for batch in batches for position in batch)
        return 1 - used / (self.tokens * len(batches))

    def key(self) -> Key:
        """The budget."""
        return {"data.init_args.packing.tokens": self.tokens}

    def _in_windows(self, order: Sequence[int], lengths: Sequence[int], window: int) -> Batches:
        """Sequences of examples that stand within about ``window`` tokens of the order."""
        bins: Batches = []
        part: list[int] = []
        tokens = 0
        for position in order:
            part.append(position)
            tokens += lengths[position]
            if tokens >= window:
                bins += best_fit_decreasing(part, lengths, self.tokens)
                part, tokens = [], 0
        return bins + best_fit_decreasing(part, lengths, self.tokens)


Policy: TypeAlias = FixedSize | Packed
"""Puts the examples of an order together."""


def checked_policy(
    batch_size: int, packing: Packed | None, group_by_length: bool, pad_to_longest: bool = False
) -> Policy:
    """The policy that the parameters of a data module ask for; a UserError if they contradict each other."""
    if packing is None:
        return FixedSize(batch_size, group_by_length, pad_to_longest)
    if packing.tokens < 1:
        raise UserError("packing.tokens", packing.tokens, "1 or more")
    if batch_size != 1:
        allowed = "1 with packing, where a batch is one sequence, which packing.tokens makes longer"
        raise UserError("batch_size", batch_size, allowed)
    if group_by_length:
        raise UserError("group_by_length", group_by_length, "false with packing, which pads nothing")
    return packing


def best_fit_decreasing(order: Sequence[int], lengths: Sequence[int], budget: int) -> Batches:
    """Pack examples into bins of ``budget`` tokens: each, the longest first, goes where it leaves the least room.

    How many bins there are depends on the lengths alone; the order decides among examples of one length.
    """
    bins: Batches = []
    room: list[tuple[int, int]] = []  # what is left of a bin, and the bin, ascending
    for position in _longest_first(order, lengths):
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


def split_into(batches: Batches, count: int) -> Batches:
    """The same examples in exactly ``count`` batches, by halving the fullest ones; the last are dropped if too many.

    None of the batches is empty, and they have ``count`` examples at least.
    """
    batches = batches[:count]
    while len(batches) < count:
        fullest = max(range(len(batches)), key=lambda number: len(batches[number]))
        batch = batches[fullest]
        batches[fullest : fullest + 1] = [batch[: len(batch) // 2], batch[len(batch) // 2 :]]
    return batches


def _chunks(order: Sequence[int], size: int) -> Batches:
    return [list(order[start : start + size]) for start in range(0, len(order), size)]


def _longest_first(order: Sequence[int], lengths: Sequence[int]) -> list[int]:
    return sorted(order, key=lambda position: lengths[position], reverse=True)


def _shuffled_in_groups(batches: Batches, size: int, rng: random.Random) -> Batches:
    """The batches in another order, in which each ``size`` of them from the first on stay together."""
    groups = [batches[start : start + size] for start in range(0, len(batches), size)]
    # An incomplete group stays last, or it would shift the ones behind it.
    last = [groups.pop()] if len(batches) % size else []
    rng.shuffle(groups)
    return [batch for group in groups + last for batch in group]
