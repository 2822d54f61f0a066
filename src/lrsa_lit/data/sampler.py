"""Training batches that can be resumed at any point, on any number of devices.

The run's seed and the epoch's number decide the batches of an epoch. The position of a run is therefore two numbers:
the epoch, and how many of its batches were yielded. Its state is the position, the seed and the settings that decide
the batches.
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
        of_step: the positions of all batches, on all ranks, of the same optimizer step.
    """

    of_step: list[int]


class EpochSampler(Sampler[StepBatch]):
    """The batches of one rank; each pass is one epoch.

    The epoch advances with the first batch of a pass, so the next pass is the next epoch even if this pass is not
    finished.

    Args:
        plan: decides the batches.
        seed: the run's seed.
        rank: index of this process among those that share the batches.
        cut_at: number of batches after which the trainer ends an epoch, so that the state is the start of the next one;
            None for all batches.
        same_order: whether every epoch repeats the first one, as for ``overfit_batches``.
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
            # The trainer also makes a step at the end of an epoch.
            end = min(first + self.plan.batches_a_step, self.cut_at)
            batch.of_step = list(itertools.chain(*of_ranks[first * ranks : end * ranks]))
        return own

    def state_dict(self) -> dict[str, Any]:
        """The position where the next pass begins, and everything that the batches depend on."""
        return self.state(self.epoch, self.batch)

    def state(self, epoch: int, batch: int) -> dict[str, Any]:
        """The state after ``batch`` batches of an epoch, in plain types that checkpoints load with weights_only."""
        epoch, batch = self._after(epoch, batch)
        return {"seed": self.seed, "epoch": epoch, "batch": batch, "made_of": self.plan.key()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume the next pass at the position of a state.

        Raises:
            UserError: the state is invalid, or it belongs to other batches.
        """
        counts = [state.get(name) for name in ("seed", "epoch", "batch")]
        if not all(isinstance(count, int) for count in counts) or not isinstance(state.get("made_of"), Mapping):
            raise UserError("ckpt_path", reason="its position in the training data has an unknown format")
        saved, own = state["made_of"], self.plan.key()
        if differing := [name for name in own if saved.get(name) != own[name]]:
            listed = ", ".join(f"{name} was {saved.get(name)} and is {own[name]}" for name in differing)
            reason = f"its position in the training data does not apply here: {listed}"
            raise UserError("ckpt_path", reason=reason, hint="resume with the former values, or start a new fit")
        self.seed = state["seed"]
        self.epoch, self.batch = self._after(state["epoch"], state["batch"])

    def _after(self, epoch: int, batch: int) -> tuple[int, int]:
        """The epoch and position of the next batch: the end of one epoch is the start of the next."""
        return (epoch, batch) if batch < self.cut_at else (epoch + 1, 0)


@dataclass(eq=False)
class EpochIterator(Iterator[StepBatch]):
    """One pass of an :class:`EpochSampler`; a data loader stores its state with each prefetched batch."""

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
        """The sampler's state after the batches yielded so far."""
        return self.sampler.state(self.epoch, self.batch)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Not supported; torchdata asks for the state only if this method exists."""
        raise NotImplementedError("load the state of the sampler")


class ResumableLoader(StatefulDataLoader[TrainBatch]):
    """A data loader whose state is that of its sampler after the last yielded batch.

    torchdata stores the sampler's state with each batch, however many are prefetched. The rest of its state belongs to
    the workers and would tie a run to their number. It is dropped, because examples are read by position and the
    workers have no state.
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
        """Resume after the last yielded batch; raise a UserError if the state belongs to other batches."""
        super().load_state_dict({})
        self.batch_sampler.load_state_dict(state_dict)
