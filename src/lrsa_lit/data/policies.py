"""How examples are put together: so many to a batch, similar lengths to a batch, or packed into one sequence."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from lrsa_lit.data.batching import (
    Batches,
    best_fit_decreasing,
    chunks,
    packed_in_windows,
    shuffled_in_groups,
    sorted_in_windows,
    split_into,
)
from lrsa_lit.data.order import Key
from lrsa_lit.errors import UserError

# Sorting or packing more at once wastes less and mixes less. HF's Trainer sorts as many batches at a time.
_WINDOW = 50

# In the words of the YAML.


@dataclass(frozen=True)
class FixedSize:
    """So many examples to a batch, padded to the longest of it.

    Attributes:
        size: examples in a batch.
        by_length: put examples of similar lengths together, among those that are near each other in the order; the
            batches of one step, over all ranks, are similar as well.
    """

    size: int
    by_length: bool = False

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
            return split_into(chunks(order, self.size), count)
        order = sorted_in_windows(order, lengths, _WINDOW * self.size * ranks)
        return shuffled_in_groups(split_into(chunks(order, self.size), count), ranks, rng)

    def check(self, lengths: Sequence[int]) -> None:
        """Any length will do."""

    def padding(self, batches: Batches, lengths: Sequence[int]) -> float:
        """The share of the batches' tokens that is no token of an example, in [0, 1)."""
        rows = [[lengths[position] for position in batch] for batch in batches]
        return 1 - sum(map(sum, rows)) / sum(len(row) * max(row) for row in rows)

    def key(self) -> Key:
        """What decides the batches."""
        return {"data.init_args.batch_size": self.size, "data.init_args.group_by_length": self.by_length}


@dataclass(frozen=True)
class Packed:
    """Several examples in one sequence; nothing is cut, and nothing padded.

    Attributes:
        tokens: the most of a sequence; no example may have more.
    """

    tokens: int

    def count(self, order: Sequence[int], lengths: Sequence[int]) -> int:
        """As many as this order takes, and not fewer than packing everything at once takes."""
        return max(
            len(packed_in_windows(order, lengths, self.tokens, _WINDOW * self.tokens)),
            len(best_fit_decreasing(order, lengths, self.tokens)),
        )

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
        batches = packed_in_windows(order, lengths, self.tokens, window)
        while len(batches) > count and window < everything:
            window *= 2
            batches = packed_in_windows(order, lengths, self.tokens, window)
        rng.shuffle(batches)
        return split_into(batches, count)

    def check(self, lengths: Sequence[int]) -> None:
        """Every example must fit into a sequence.

        Raises:
            UserError: the longest does not.
        """
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


Policy: TypeAlias = FixedSize | Packed
"""Puts the examples of an order together."""


def checked_policy(batch_size: int, packing: Packed | None, group_by_length: bool) -> Policy:
    """The policy that the parameters of a data module ask for.

    Raises:
        UserError: they contradict each other.
    """
    if packing is None:
        return FixedSize(batch_size, group_by_length)
    if packing.tokens < 1:
        raise UserError("packing.tokens", packing.tokens, "1 or more")
    if batch_size != 1:
        allowed = "1 with packing, where a batch is one sequence, which packing.tokens makes longer"
        raise UserError("batch_size", batch_size, allowed)
    if group_by_length:
        raise UserError("group_by_length", group_by_length, "false with packing, which pads nothing")
    return packing
