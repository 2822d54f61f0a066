"""Training batches that can be taken up again at any point, on any number of devices.

The batches of an epoch follow from the run's seed and the epoch's number alone. Where a run stands is therefore two
numbers, the epoch and the batches of it that were handed out; with the seed and what else decides the batches they are
its state.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch.utils.data import Sampler
from torchdata.stateful_dataloader import StatefulDataLoader

from lrsa_lit.data.collate import TrainBatch
from lrsa_lit.data.plan import EpochPlan
from lrsa_lit.errors import UserError


class StepBatch(list[int]):
    """The positions of a batch's examples.

    Attributes:
        of_step: those of all batches, on all ranks, whose gradients are added up with this one's.
    """

    of_step: list[int]


class EpochSampler(Sampler[StepBatch]):
    """The batches of one rank, an epoch for each pass.

    A pass that hands out a batch begins its epoch, and the next pass is the next epoch, whether the former came to its
    end or not.

    Args:
        plan: decides the batches.
        seed: the run's.
        rank: this process among those that share the batches.
        cut_at: after how many batches the trainer ends an epoch, and a state is that of the next one's start; None for
            after all of them.
        same_order: every epoch is the first one, to overfit on some batches.
    """

    def __init__(
        self, plan: EpochPlan, seed: int, rank: int = 0, cut_at: int | None = None, same_order: bool = False
    ) -> None:
        self.plan = plan
        self.seed = seed
        self.rank = rank
        self.cut_at = len(self) if cut_at is None else cut_at
        self.same_order = same_order
        self.epoch = 0
        self.batch = 0

    def __len__(self) -> int:
        return len(self.plan) // self.plan.ranks

    def __iter__(self) -> EpochIterator:
        return EpochIterator(self, self.epoch, self.batch)

    def batches(self, epoch: int) -> list[StepBatch]:
        """This rank's batches of an epoch."""
        of_ranks, ranks = self.plan.batches(self.seed, 0 if self.same_order else epoch), self.plan.ranks
        own = [StepBatch(positions) for positions in of_ranks[self.rank :: ranks]]
        for number, batch in enumerate(own):
            first = number - number % self.plan.batches_a_step
            # The trainer makes a step where it ends an epoch.
            end = min(first + self.plan.batches_a_step, self.cut_at)
            batch.of_step = list(itertools.chain(*of_ranks[first * ranks : end * ranks]))
        return own

    def state_dict(self) -> dict[str, Any]:
        """Where the next pass begins, and what the batches depend on."""
        return self.state(self.epoch, self.batch)

    def state(self, epoch: int, batch: int) -> dict[str, Any]:
        """The state after ``batch`` batches of an epoch: plain types, so that a checkpoint loads with weights_only."""
        epoch, batch = self._after(epoch, batch)
        return {"seed": self.seed, "epoch": epoch, "batch": batch, "made_of": self.plan.key()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Let the next pass go on where a state was taken; a UserError if it is none, or counts other batches."""
        counts = [state.get(name) for name in ("seed", "epoch", "batch")]
        if not all(isinstance(count, int) for count in counts) or not isinstance(state.get("made_of"), Mapping):
            raise UserError("ckpt_path", reason="its place in the training data has not the form that a fit writes")
        saved, own = state["made_of"], self.plan.key()
        if differing := [name for name in own if saved.get(name) != own[name]]:
            listed = ", ".join(f"{name} was {saved.get(name)} and is {own[name]}" for name in differing)
            reason = f"its place in the training data has no meaning here: {listed}"
            raise UserError("ckpt_path", reason=reason, hint="resume with the former values, or start a new fit")
        self.seed = state["seed"]
        self.epoch, self.batch = self._after(state["epoch"], state["batch"])

    def _after(self, epoch: int, batch: int) -> tuple[int, int]:
        """The epoch of the batch that follows, and its place there: the end of one epoch is the start of the next."""
        return (epoch, batch) if batch < self.cut_at else (epoch + 1, 0)


@dataclass(eq=False)
class EpochIterator(Iterator[StepBatch]):
    """One pass of an :class:`EpochSampler`, whose state a data loader keeps with each batch that it prefetches."""

    sampler: EpochSampler
    epoch: int
    batch: int
    batches: Sequence[StepBatch] | None = None

    def __next__(self) -> StepBatch:
        if self.batches is None:
            self.batches = self.sampler.batches(self.epoch)
            self.sampler.epoch, self.sampler.batch = self.epoch + 1, 0
        if self.batch == len(self.batches):
            raise StopIteration
        self.batch += 1
        return self.batches[self.batch - 1]

    def state_dict(self) -> dict[str, Any]:
        """The sampler's state after the batches handed out so far."""
        return self.sampler.state(self.epoch, self.batch)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Part of torchdata's protocol, without which it would not ask for the state."""
        raise NotImplementedError("load the state of the sampler")


class ResumableLoader(StatefulDataLoader[TrainBatch]):
    """A data loader whose state is its sampler's, at the batch that was handed out last.

    torchdata keeps the sampler's state with each batch, however many are prefetched. The rest of its state is that of
    its workers, which would tie a run to their number; examples are read by position, so there is nothing in it.
    """

    batch_sampler: EpochSampler

    def state_dict(self) -> dict[str, Any]:
        """The state of :class:`EpochSampler`."""
        if self._iterator is None:
            return self.batch_sampler.state_dict()
        state = super().state_dict()
        main = state["_snapshot"]["_main_snapshot"] if self.num_workers else state
        return dict(main["_sampler_iter_state"])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on after the batch that was handed out last; a UserError if the state belongs to other batches."""
        super().load_state_dict({})
        self.batch_sampler.load_state_dict(state_dict)
