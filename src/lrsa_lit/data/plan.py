"""The batches of each epoch, decided by the run's seed and the epoch's number, with an optional length curriculum."""

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
    """A stage of a curriculum: no example is longer than ``max_tokens`` before the optimizer step ``until_step``.

    The last stage has no ``until_step``.
    """

    max_tokens: int
    until_step: int | None = None


@dataclass(eq=False)
class EpochPlan:
    """Puts each example of an epoch into one batch, with the same number of batches in every epoch.

    With several ranks, some batches are halved so that each rank gets equally many. If batches hold one example each,
    up to ``ranks`` - 1 examples are left out instead, different ones in each epoch.

    A curriculum moves examples that are too long for a stage after it. If a stage of an epoch has more batches than its
    examples fill, they are repeated, and an equal number of longer examples waits for the next epoch.

    Attributes:
        lengths: tokens of each example.
        policy: groups examples into batches.
        order: the order of an epoch's examples.
        ranks: number of data-parallel processes.
        curriculum: the stages; if empty, all examples are used at any time.
        batches_a_step: batches over which gradients are accumulated.

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
        # The length must not depend on the run's seed: a checkpoint may set it after Lightning has read the length.
        first = self.order(0, 0)
        # Each rank gets equally many batches, and each batch at least one example.
        rounded_up = -(-self.policy.count(first, self.lengths) // self.ranks) * self.ranks
        self._length = min(rounded_up, len(first) // self.ranks * self.ranks)
        if not self._length:
            raise UserError("devices", self.ranks, f"fewer, as there are only {len(first)} training examples")

    def __len__(self) -> int:
        return self._length

    def key(self) -> Key:
        """Everything except the seed that decides the batches."""
        # A change of texts that keeps all lengths is not detected.
        digest = hashlib.sha256(array("Q", self.lengths).tobytes()).hexdigest()[:8]
        examples = f"{len(self.lengths)} (lengths {digest})"
        key: Key = {"training examples": examples, **self.order.key(), **self.policy.key()}
        if self.curriculum:
            stages = ", ".join(f"{stage.max_tokens} tokens until {stage.until_step}" for stage in self.curriculum)
            key |= {"data.init_args.curriculum": stages, "trainer.accumulate_grad_batches": self.batches_a_step}
        return key | {"number of devices": self.ranks}

    def batches(self, seed: int, epoch: int) -> Batches:
        """The batches of an epoch; consecutive batches go to consecutive ranks."""
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
        """The share of an epoch's tokens that is padding; with packing, the unused share of the token budget."""
        return self.policy.padding(self.batches(seed, epoch), self.lengths)

    def _pool(
        self, order: Sequence[int], waiting: Sequence[int], max_tokens: int, count: int, rng: random.Random
    ) -> list[int]:
        """Examples for ``count`` batches of a stage: waiting ones first, then repeated ones if too few are waiting."""
        pool = self._up_to(max_tokens, waiting)
        enough = self.policy.enough(pool, self.lengths, count)
        # If no longer examples are put off, the epoch is simply near its end and needs no repetition.
        if len(pool) < count or (enough > len(pool) and len(pool) < len(waiting)):
            # An epoch of a mixture may have no example that is short enough.
            allowed = self._up_to(max_tokens, order) or self._up_to(max_tokens, range(len(self.lengths)))
            while enough > len(pool):
                # Double the pool each time, so that repeating few examples often takes few rounds.
                for _ in range(max(1, len(pool) // len(allowed))):
                    pool += rng.sample(allowed, len(allowed))
                enough = self.policy.enough(pool, self.lengths, count)
        return pool[:enough]

    def _up_to(self, max_tokens: int, positions: Sequence[int]) -> list[int]:
        return [position for position in positions if self.lengths[position] <= max_tokens]


def check_stages(stages: Sequence[Stage]) -> None:
    """Raise a UserError if the stages' lengths and steps do not increase, or are out of range."""
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
    """Raise a UserError if the first stage admits no example, or the last one does not admit all."""
    if not stages:
        return
    first, last = stages[0].max_tokens, stages[-1].max_tokens
    if first < min(lengths):
        shortest = f"{min(lengths)} or more, the length of the shortest training example"
        raise UserError("curriculum.0.max_tokens", first, shortest)
    if last < max(lengths):
        longest = f"{max(lengths)} or more, the length of the longest training example, which must be used"
        raise UserError(f"curriculum.{len(stages) - 1}.max_tokens", last, longest)


def segments(stages: Sequence[Stage], epoch: int, batches: int, batches_a_step: int) -> list[tuple[int, int]]:
    """The (max_tokens, number of batches) of each stage that overlaps an epoch.

    ``batches`` is the number of an epoch's batches on one rank; its last step may accumulate fewer than
    ``batches_a_step``.
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
    """The order without the examples in the batches; each occurrence in a batch removes one."""
    taken = Counter(position for batch in batches for position in batch)
    left = []
    for position in order:
        if taken[position]:
            taken[position] -= 1
        else:
            left.append(position)
    return left
