"""The batches of an epoch, from the run's seed and the epoch's number."""

from __future__ import annotations

import hashlib
import random
from array import array
from collections import Counter
from collections.abc import Sequence

from lrsa_lit.data.batching import Batches, batches_an_epoch
from lrsa_lit.data.curriculum import Stage, segments
from lrsa_lit.data.order import Key, Order
from lrsa_lit.data.policies import Policy
from lrsa_lit.errors import UserError


class EpochPlan:
    """Each example of an epoch's order in one batch, the same number of batches in every epoch.

    With several ranks, some batches are halved so that each rank gets as many. Only where batches hold one example each
    may this not do: then up to ``ranks`` - 1 examples are left out, others in each epoch.

    A curriculum puts examples that are too long for a stage behind those of it. Where an epoch has more batches in a
    stage than there are examples for, these come again, and as many of the longer ones have to wait for the next epoch.

    Args:
        lengths: tokens of each example.
        policy: puts examples together.
        order: of the examples of an epoch.
        ranks: data-parallel processes.
        curriculum: its stages, none for all examples at any time.
        batches_a_step: that gradients are accumulated over.

    Raises:
        UserError: there are fewer examples than ranks.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        policy: Policy,
        order: Order,
        ranks: int = 1,
        curriculum: Sequence[Stage] = (),
        batches_a_step: int = 1,
    ) -> None:
        self.lengths = lengths
        self.policy = policy
        self.order = order
        self.ranks = ranks
        self.curriculum = curriculum
        self.batches_a_step = batches_a_step
        # Independent of the run's seed, which a checkpoint may bring after Lightning has asked for the length.
        first = order(0, 0)
        self._length = batches_an_epoch(policy.count(first, lengths), len(first), ranks)
        if not self._length:
            raise UserError("devices", ranks, f"fewer, as there are {len(first)} training examples to share")

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
        return key

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
