"""From examples to data loaders: what the trainer decides about batches, and what a loader is made with."""

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
    """What the trainer decides about batches; the defaults are those of no trainer at all.

    Attributes:
        rank: this process among those that share the batches of training.
        ranks: how many they are; processes that make one batch together count once.
        device: this process among those that share the questions of an evaluation.
        devices: how many they are, of whose gradients the mean is taken.
        batches_a_step: that gradients are accumulated over.
        limit: the batches after which an epoch is cut short, or the share of them; the float 1.0 leaves it whole.
        same_order: whether every epoch is the first one, to overfit on some batches.
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
        """Those of a trainer that the data module is attached to.

        Raises:
            UserError: Lightning would divide the batches, too, or change how many a step has.
        """
        if trainer is None:
            return cls()
        check_steps(trainer)
        # Not the global rank: processes that hold parts of one model train on the same batches.
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
        """How many of an epoch's batches Lightning takes."""
        # The integer 1 is one batch, the float all of them.
        return min(self.limit, epoch) if isinstance(self.limit, int) else int(self.limit * epoch)


def check_steps(trainer: lightning.Trainer) -> None:
    """Raise a UserError if the number of batches in a step would change: a batch says what its step consists of."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, GradientAccumulationScheduler):
            hint = "all steps have accumulate_grad_batches of the trainer"
            raise UserError("callbacks", type(callback).__name__, hint=hint)


def training_loader(
    examples: datasets.Dataset, plan: EpochPlan, settings: TrainerSettings, pad_token_id: int, workers: int
) -> ResumableLoader:
    """This rank's training batches; a UserError if a curriculum counts steps that the trainer does not make."""
    made: Callable[[list[Example]], TrainBatch] = collate_packed
    if not isinstance(plan.policy, Packed):
        made = partial(collate_training, pad_token_id=pad_token_id, length=plan.policy.row_length(plan.lengths))
    return in_plan(_Batches(examples, made), plan, settings, workers)


def in_plan(batches: Dataset[Any], plan: EpochPlan, settings: TrainerSettings, workers: int) -> ResumableLoader:
    """This rank's part of what a plan decides; ``__getitems__`` of the batches makes one of examples' positions."""
    cut_at = settings.batches_of(len(plan) // settings.ranks)
    sampler = EpochSampler(plan, torch.initial_seed(), settings.rank, cut_at, settings.same_order)
    if plan.curriculum and cut_at < len(sampler):
        hint = "only limit_train_batches=1.0 and overfit_batches=0 are allowed with it"
        raise UserError("curriculum", reason="it counts steps by whole epochs", hint=hint)
    return ResumableLoader(batches, batch_sampler=sampler, collate_fn=_made, **_options(workers))


def evaluation_loader(
    examples: datasets.Dataset, batch_size: int, settings: TrainerSettings, pad_token_id: int, workers: int
) -> DataLoader[Batch]:
    """Batches in a fixed order, as :func:`in_order` has them."""
    return in_order(examples, batch_size, settings, partial(collate, pad_token_id=pad_token_id), workers)


def in_order(
    examples: Any, batch_size: int, settings: TrainerSettings, collate_fn: Callable[[Any], Any], workers: int
) -> DataLoader[Any]:
    """Batches in a fixed order, the same ones for any number of ranks; of R ranks, each gets every R-th.

    Every rank gets as many, which sharded models need: rows that come again for it are marked as ``repeated``.
    Examples are mappings, and get their ``position`` as well.
    """
    return DataLoader(
        _Repeating(examples),
        batch_size=batch_size,
        sampler=_EveryRth(len(examples), batch_size, settings.device, settings.devices),
        collate_fn=collate_fn,
        **_options(workers),
    )


class _EveryRth(DistributedSampler[Any]):
    """The positions of every R-th batch; one beyond the last example stands for a repeated one.

    It is of a type that Lightning does not wrap into another sampler.
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
    """Training batches, each with its examples' positions and the sizes of its optimizer step's."""

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
    """Examples by position, from the first on again after the last."""

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
        # Workers are seeded from a generator of their own, so that loading leaves the run's random state alone.
        "generator": torch.Generator(),
    }
