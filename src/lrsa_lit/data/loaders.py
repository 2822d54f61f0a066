"""Data loaders for examples, and the trainer's settings that affect them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import datasets
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.distributed import DistributedSampler

from lrsa_lit.data import token_cache
from lrsa_lit.data.collate import Batch, TrainBatch, collate, collate_packed, collate_training
from lrsa_lit.data.plan import EpochPlan
from lrsa_lit.data.policies import Packed
from lrsa_lit.data.sampler import EpochSampler, ResumableLoader, StepBatch
from lrsa_lit.errors import UserError
from lrsa_lit.lightning_internals import divides_batches

if TYPE_CHECKING:
    import lightning

    from lrsa_lit.data.prompts import Example


@dataclass(frozen=True)
class TrainerSettings:
    """The trainer's settings about batches; the defaults apply without a trainer.

    Attributes:
        rank: index of this process among those that share the training batches.
        ranks: number of these processes; processes that make one batch together count once.
        device: index of this process among those that share the questions of an evaluation.
        devices: number of these processes; gradients are averaged over them.
        batches_a_step: batches over which gradients are accumulated.
        limit: training batches per epoch (int), or the share of them (float); 1.0 uses the whole epoch.
        same_order: whether every epoch repeats the first one, as for ``overfit_batches``.
    """

    rank: int = 0
    ranks: int = 1
    device: int = 0
    devices: int = 1
    batches_a_step: int = 1
    limit: int | float = 1.0
    same_order: bool = False

    @classmethod
    def of(cls, trainer: lightning.Trainer | None) -> TrainerSettings:
        """Read the settings of the trainer that the data module is attached to, if any.

        Raises:
            UserError: Lightning would also divide the batches among processes, or change the number per step.
        """
        if trainer is None:
            return cls()
        check_steps(trainer)
        # Not the global rank, because processes that hold parts of one model train on the same batches.
        shared = trainer.distributed_sampler_kwargs or {"rank": 0, "num_replicas": 1}
        if shared["num_replicas"] > 1 and divides_batches(trainer):
            raise UserError("use_distributed_sampler", True, "false, as the data module divides the batches itself")
        values = vars(trainer)
        asked = getattr(trainer.strategy, "evaluation_sampler_kwargs", shared)
        return cls(
            rank=shared["rank"],
            ranks=shared["num_replicas"],
            device=asked["rank"],
            devices=asked["num_replicas"],
            batches_a_step=values["accumulate_grad_batches"],
            limit=values["limit_train_batches"],
            same_order=bool(values["overfit_batches"]),
        )

    def batches_of(self, epoch: int) -> int:
        """How many of an epoch's batches Lightning uses."""
        # The integer 1 means one batch, the float 1.0 all batches.
        return min(self.limit, epoch) if isinstance(self.limit, int) else int(self.limit * epoch)


def check_steps(trainer: lightning.Trainer) -> None:
    """Raise a UserError if the number of batches per step would change, as each batch stores the sizes of its step."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, GradientAccumulationScheduler):
            hint = "all steps must have the trainer's accumulate_grad_batches"
            raise UserError("callbacks", type(callback).__name__, hint=hint)


def training_loader(
    examples: datasets.Dataset, plan: EpochPlan, settings: TrainerSettings, pad_token_id: int, workers: int
) -> ResumableLoader:
    """Make the loader of this rank's training batches.

    Raises:
        UserError: a curriculum counts steps that the trainer would not make.
    """
    made: Callable[[list[Example]], TrainBatch] = collate_packed
    if not isinstance(plan.policy, Packed):
        made = partial(collate_training, pad_token_id=pad_token_id, length=plan.policy.row_length(plan.lengths))
    return in_plan(_Batches(examples, made), plan, settings, workers)


def in_plan(batches: Dataset[Any], plan: EpochPlan, settings: TrainerSettings, workers: int) -> ResumableLoader:
    """Make a loader of this rank's share of a plan; ``batches.__getitems__`` turns positions into a batch."""
    cut_at = settings.batches_of(len(plan) // settings.ranks)
    sampler = EpochSampler(plan, torch.initial_seed(), settings.rank, cut_at, settings.same_order)
    if plan.curriculum and cut_at < len(sampler):
        hint = "only limit_train_batches=1.0 and overfit_batches=0 are allowed with it"
        raise UserError("curriculum", reason="counts steps in whole epochs", hint=hint)
    return ResumableLoader(batches, batch_sampler=sampler, collate_fn=_made, **_options(workers))


def evaluation_loader(
    examples: datasets.Dataset, batch_size: int, settings: TrainerSettings, pad_token_id: int, workers: int
) -> DataLoader[Batch]:
    """Make a loader of evaluation batches in the fixed order of :func:`in_order`."""
    return in_order(examples, batch_size, settings, partial(collate, pad_token_id=pad_token_id), workers)


def in_order(
    examples: Any, batch_size: int, settings: TrainerSettings, collate_fn: Callable[[Any], Any], workers: int
) -> DataLoader[Any]:
    """Make a loader of batches in a fixed order: the same batches for any number of ranks R, each getting every R-th.

    Every rank gets the same number of batches, as sharded models require; rows that only fill a rank up are marked as
    ``repeated``. Examples are mappings; ``position`` is added to each.
    """
    return DataLoader(
        _Repeating(examples),
        batch_size=batch_size,
        sampler=_EveryRth(len(examples), batch_size, settings.device, settings.devices),
        collate_fn=collate_fn,
        **_options(workers),
    )


class _EveryRth(DistributedSampler[Any]):
    """The positions of every R-th batch; a position beyond the last example marks a repeated example.

    It derives from DistributedSampler so that Lightning does not wrap it in another sampler.
    """

    def __init__(self, examples: int, batch_size: int, rank: int, ranks: int) -> None:
        super().__init__(cast("Dataset[Any]", range(examples)), num_replicas=ranks, rank=rank, shuffle=False)
        starts = range(rank * batch_size, examples, ranks * batch_size)
        self._positions = [each for start in starts for each in range(start, min(start + batch_size, examples))]
        if len(starts) < -(-examples // (ranks * batch_size)):
            self._positions.append(examples)

    def __iter__(self) -> Iterator[int]:
        return iter(self._positions)

    def __len__(self) -> int:
        return len(self._positions)


class _Batches(Dataset[Any]):
    """Training batches, with the positions of their examples and the sizes of all examples of the optimizer step."""

    def __init__(self, examples: datasets.Dataset, made: Callable[[list[Example]], TrainBatch]) -> None:
        self._examples = examples
        self._sizes = token_cache.sizes(examples)
        self._made = made

    def __len__(self) -> int:
        return len(self._examples)

    def __getitems__(self, positions: StepBatch) -> TrainBatch:
        batch = self._made(self._examples.__getitems__(list(positions)))
        step_sizes = [self._sizes[position] for position in positions.of_step]
        return {**batch, "position": list(positions), "step_sizes": step_sizes}


class _Repeating(Dataset[Any]):
    """Examples by position; positions beyond the last example start again at the first."""

    def __init__(self, examples: Any) -> None:
        self._examples = examples

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, position: int) -> Any:
        turn, position = divmod(position, len(self._examples))
        return {**self._examples[position], "repeated": turn > 0, "position": position}


def _made(batch: TrainBatch) -> TrainBatch:
    return batch


def _options(workers: int) -> dict[str, Any]:
    return {
        "num_workers": workers,
        "persistent_workers": workers > 0,
        "pin_memory": torch.cuda.is_available(),
        # A separate generator seeds the workers, so loading does not change the run's random state.
        "generator": torch.Generator(),
    }
