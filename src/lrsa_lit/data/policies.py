"""Policies that group examples into batches: a fixed number, similar lengths, or packed into one sequence.

An order is a list of positions in a data set, and so is a batch. The policies never read the examples.
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

# Batches that are sorted or packed at once: a larger window wastes less but shuffles less. HF's Trainer also uses 50.
_WINDOW = 50
# With to_longest, the length of batches is a multiple of this.
_MULTIPLE = 64


@dataclass(frozen=True)
class FixedSize:
    """A fixed number of examples per batch, padded to the longest of the batch.

    Attributes:
        size: examples per batch.
        by_length: group examples of similar lengths, within windows of the order. The batches that the ranks train on
            at the same time are also similar.
        to_longest: pad every batch to the longest example of the data set.
    """

    size: int
    by_length: bool = False
    to_longest: bool = False

    def count(self, order: Sequence[int], lengths: Sequence[int]) -> int:
        """Number of batches for the examples of an order, however it is shuffled; only the last may not be full."""
        return -(-len(order) // self.size)

    def enough(self, order: Sequence[int], lengths: Sequence[int], count: int) -> int:
        """How many examples from the start of the order fill ``count`` batches; may exceed the length of the order."""
        return count * self.size

    def batches(
        self, order: Sequence[int], lengths: Sequence[int], count: int, ranks: int, rng: random.Random
    ) -> Batches:
        """Exactly ``count`` batches from an order of at least ``count`` examples; surplus examples are left out."""
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
        """Accept any lengths."""

    def row_length(self, lengths: Sequence[int]) -> int:
        """Minimum number of columns of a batch."""
        return -(-max(lengths) // _MULTIPLE) * _MULTIPLE if self.to_longest else 0

    def padding(self, batches: Batches, lengths: Sequence[int]) -> float:
        """The share of the batches' tokens that is padding, in [0, 1)."""
        rows = [[lengths[position] for position in batch] for batch in batches]
        least = self.row_length(lengths)
        return 1 - sum(map(sum, rows)) / sum(len(row) * max(least, *row) for row in rows)

    def key(self) -> Key:
        """The settings that decide the batches, by their YAML keys."""
        return {"data.init_args.batch_size": self.size, "data.init_args.group_by_length": self.by_length}


@dataclass(frozen=True)
class Packed:
    """Several examples packed into one sequence of at most ``tokens`` tokens, without truncation or padding."""

    tokens: int

    def count(self, order: Sequence[int], lengths: Sequence[int]) -> int:
        """Number of sequences for this order: at least as many as packing all examples at once needs."""
        in_windows = self._in_windows(order, lengths, _WINDOW * self.tokens)
        return max(len(in_windows), len(best_fit_decreasing(order, lengths, self.tokens)))

    def enough(self, order: Sequence[int], lengths: Sequence[int], count: int) -> int:
        """How many examples from the start of the order have the tokens of ``count`` completely filled sequences."""
        tokens = 0
        for number, position in enumerate(order, start=1):
            tokens += lengths[position]
            if tokens >= count * self.tokens:
                return number
        return len(order) + 1

    def batches(
        self, order: Sequence[int], lengths: Sequence[int], count: int, ranks: int, rng: random.Random
    ) -> Batches:
        """Pack within windows of the order, doubling the window until ``count`` sequences suffice or it spans all."""
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
            allowed = f"{longest} or more, the length of the longest training example, which is not cut"
            raise UserError("packing.tokens", self.tokens, allowed, hint="or lower max_tokens")

    def padding(self, batches: Batches, lengths: Sequence[int]) -> float:
        """The unused share of the token budget."""
        used = sum(lengths[position] for batch in batches for position in batch)
        return 1 - used / (self.tokens * len(batches))

    def key(self) -> Key:
        """The token budget, by its YAML key."""
        return {"data.init_args.packing.tokens": self.tokens}

    def _in_windows(self, order: Sequence[int], lengths: Sequence[int], window: int) -> Batches:
        """Pack examples that are at most about ``window`` tokens apart in the order."""
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
"""Groups the examples of an order into batches."""


def checked_policy(
    batch_size: int, packing: Packed | None, group_by_length: bool, pad_to_longest: bool = False
) -> Policy:
    """The policy for the parameters of a data module.

    Raises:
        UserError: the parameters contradict each other.
    """
    if packing is None:
        return FixedSize(batch_size, group_by_length, pad_to_longest)
    if packing.tokens < 1:
        raise UserError("packing.tokens", packing.tokens, "1 or more")
    if batch_size != 1:
        allowed = "1 with packing, as a batch is one sequence; packing.tokens sets its length"
        raise UserError("batch_size", batch_size, allowed)
    if group_by_length:
        raise UserError("group_by_length", group_by_length, "false with packing, which needs no padding")
    return packing


def best_fit_decreasing(order: Sequence[int], lengths: Sequence[int], budget: int) -> Batches:
    """Pack examples into bins of ``budget`` tokens: longest first, each into the bin where it leaves the least room.

    The number of bins depends only on the lengths; the order decides between examples of equal length.
    """
    bins: Batches = []
    room: list[tuple[int, int]] = []  # (free tokens, bin number) of each bin that is not full, ascending
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
    """Return exactly ``count`` batches: halve the fullest ones if there are too few, drop the last if too many.

    ``batches`` must hold no empty batch and at least ``count`` examples.
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
    """Shuffle groups of ``size`` consecutive batches; the batches of a group stay together."""
    groups = [batches[start : start + size] for start in range(0, len(batches), size)]
    # An incomplete group must stay last; elsewhere it would shift the groups after it.
    last = [groups.pop()] if len(batches) % size else []
    rng.shuffle(groups)
    return [batch for group in groups + last for batch in group]
