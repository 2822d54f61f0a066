"""The batches of an epoch, from the run's seed and the epoch's number, and a curriculum of lengths over epochs."""

from __future__ import annotations

import hashlib
import random
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from lrsa_lit.data.order import Key, Order
from lrsa_lit.data.policies import Batches, Policy
from lrsa_lit.errors import UserError


@dataclass(frozen=True)
class Stage:
    """A part of a training: no example is longer than ``max_tokens`` before the optimizer step ``until_step``.

    The last stage has no such step.
    """

    max_tokens: int
    until_step: int | None = None


@dataclass(eq=False)
class EpochPlan:
    """Each example of an epoch's order in one batch, the same number of batches in every epoch.

    With several ranks, some batches are halved so that each rank gets as many. Only where batches hold one example each
    may this not do: then up to ``ranks`` - 1 examples are left out, others in each epoch.

    A curriculum puts examples that are too long for a stage behind those of it. Where an epoch has more batches in a
    stage than there are examples for, these come again, and as many of the longer ones have to wait for the next epoch.

    Attributes:
        lengths: tokens of each example.
        policy: puts examples together.
        order: of the examples of an epoch.
        ranks: data-parallel processes.
        curriculum: its stages, none for all examples at any time.
        batches_a_step: that gradients are accumulated over.

    Raises:
        UserError: there are fewer examples than ranks.
    """

    lengths: Sequence[int]
    policy: Policy
    order: Order
    ranks: int = 1
    curriculum: Sequence[Stage] = ()
    batches_a_step: int = 1

    def __post_init__(self) -> None:
        # Independent of the run's seed, which a checkpoint may bring after Lightning has asked for the length.
        first = self.order(0, 0)
        # As many for each rank; and no batch can have less than one example.
        rounded_up = -(-self.policy.count(first, self.lengths) // self.ranks) * self.ranks
        self._length = min(rounded_up, len(first) // self.ranks * self.ranks)
        if not self._length:
            raise UserError("devices", self.ranks, f"fewer, as there are {len(first)} training examples to share")

    def __len__(self) -> int:
        return self._length

    def key(self) -> Key:
        """What decides the batches beside the seed."""
        # Other texts of exactly the same lengths would go unnoticed.
        digest = hashlib.sha256(array("Q", self.lengths).tobytes()).hexdigest()[:8]
        examples = f"{len(self.lengths)} (lengths {digest})"
        key: Key = {"training examples": examples, **self.order.key(), **self.policy.key()}
        if self.curriculum:
            stages = ", ".join(f"{stage.max_tokens} tokens until {stage.until_step}" for stage in self.curriculum)
            key |= {"data.init_args.curriculum": stages, "trainer.accumulate_grad_batches": self.batches_a_step}
        return key | {"number of devices": self.ranks}

    def batches(self, seed: int, epoch: int) -> Batches:
        """The batches of an epoch, for all ranks in turn."""
        rng = random.Random(f"{seed}:{epoch}:batches")
        order = self.order(seed, epoch)
        if not self.curriculum:
            return self.policy.batches(order, self.lengths, len(self), self.ranks, rng)
        batches: Batches = []
        waiting = order
        for max_tokens, count in segments(self.curriculum, epoch, len(self) // self.ranks, self.batches_a_step):
            count *= self.ranks
            pool = self._pool(order, waiting, max_tokens, count, rng)
            made = self.policy.batches(pool, self.lengths, count, self.ranks, rng)
            waiting = _without(waiting, made)
            batches += made
        return batches

    def padding(self, seed: int, epoch: int) -> float:
        """The share of an epoch's tokens that is padding or, packed, of its budget that is unused."""
        return self.policy.padding(self.batches(seed, epoch), self.lengths)

    def _pool(
        self, order: Sequence[int], waiting: Sequence[int], max_tokens: int, count: int, rng: random.Random
    ) -> list[int]:
        """Examples for ``count`` batches of a stage: those that wait and, if they are too few, more of the same."""
        pool = self._up_to(max_tokens, waiting)
        enough = self.policy.enough(pool, self.lengths, count)
        # Where nothing longer is put off, the epoch simply nears its end.
        if len(pool) < count or (enough > len(pool) and len(pool) < len(waiting)):
            # An epoch of a mixture may have none that is short enough.
            allowed = self._up_to(max_tokens, order) or self._up_to(max_tokens, range(len(self.lengths)))
            while enough > len(pool):
                # As much again each time, so that many repetitions of few examples take few turns.
                for _ in range(max(1, len(pool) // len(allowed))):
                    pool += rng.sample(allowed, len(allowed))
                enough = self.policy.enough(pool, self.lengths, count)
        return pool[:enough]

    def _up_to(self, max_tokens: int, positions: Sequence[int]) -> list[int]:
        return [position for position in positions if self.lengths[position] <= max_tokens]


def check_stages(stages: Sequence[Stage]) -> None:
    """Raise a UserError for stages that do not follow one another."""
    for number, stage in enumerate(stages):
        last = number == len(stages) - 1
        if last and stage.until_step is not None:
            raise UserError(f"curriculum.{number}.until_step", stage.until_step, "null for the last stage")
        if not last and (stage.until_step is None or stage.until_step < 1):
            raise UserError(f"curriculum.{number}.until_step", stage.until_step, "1 or more")
        if stage.max_tokens < 1:
            raise UserError(f"curriculum.{number}.max_tokens", stage.max_tokens, "1 or more")
    for number, (before, stage) in enumerate(pairwise(stages), start=1):
        for name in ("max_tokens", "until_step"):
            value, least = getattr(stage, name), getattr(before, name) + 1
            if value is not None and value < least:
                raise UserError(f"curriculum.{number}.{name}", value, f"{least} or more")


def check_lengths(stages: Sequence[Stage], lengths: Sequence[int]) -> None:
    """Raise a UserError for a first stage without any example, and for a last one that leaves some out."""
    if not stages:
        return
    first, last = stages[0].max_tokens, stages[-1].max_tokens
    if first < min(lengths):
        shortest = f"{min(lengths)} or more, as the shortest training example has so many tokens"
        raise UserError("curriculum.0.max_tokens", first, shortest)
    if last < max(lengths):
        longest = f"{max(lengths)} or more, as the longest training example has so many tokens and is to be seen"
        raise UserError(f"curriculum.{len(stages) - 1}.max_tokens", last, longest)


def segments(stages: Sequence[Stage], epoch: int, batches: int, batches_a_step: int) -> list[tuple[int, int]]:
    """The most tokens of an example, and the number of batches, of each stage that an epoch has a part of.

    ``batches`` are those of an epoch on one rank; its last step may accumulate fewer than ``batches_a_step``.
    """
    first_step = epoch * -(-batches // batches_a_step)
    found, start = [], 0
    for stage in stages:
        stop = batches if stage.until_step is None else (stage.until_step - first_step) * batches_a_step
        stop = min(max(stop, start), batches)
        if stop > start:
            found.append((stage.max_tokens, stop - start))
        start = stop
    return found


def _without(order: Sequence[int], batches: Batches) -> list[int]:
    """The order less what is in the batches, as often as it is in them."""
    taken = Counter(position for batch in batches for position in batch)
    left = []
    for position in order:
        if taken[position]:
            taken[position] -= 1
        else:
            left.append(position)
    return left
