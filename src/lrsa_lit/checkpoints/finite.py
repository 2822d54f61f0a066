"""End a run whose loss is NaN or infinite, before a spoilt checkpoint is saved."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from lrsa_lit.checkpoints.checkpoint_io import NonFiniteLoss
from lrsa_lit.checkpoints.safe_model_checkpoint import last_good
from lrsa_lit.lightning_internals import accumulating
from lrsa_lit.strategies import gathered


class _Verdict(NamedTuple):
    """The check of a batch's loss, complete once the device has reached it; steps are counted from 1.

    Attributes:
        bad: () bool on the CPU, whether some process's loss is not finite; valid after ``copied``.
        own: the same for this process's loss.
        copied: an event after the copies; None on the CPU.
    """

    bad: Tensor
    own: Tensor
    copied: torch.cuda.Event | None
    step: int
    ids: list[str]


class FiniteLoss(Callback):
    """Stop if a loss is not finite, and report the step and the sample ids of its batch.

    A batch's loss is checked after the next batch has been submitted, so that the device never waits. So one more step
    may be taken with spoilt weights. Before a checkpoint is saved, all losses so far and the weights are checked.
    """

    def __init__(self) -> None:
        self._open: deque[_Verdict] = deque()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget earlier runs."""
        self._open.clear()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *_: Any
    ) -> None:
        """Check the previous batch's loss (NonFiniteLoss ends the run), and start copying this batch's."""
        self._examine(trainer)
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        if isinstance(loss, Tensor):
            ids = list(_flat(batch.get("id", []))) if isinstance(batch, dict) else []
            self._open.append(_verdict(loss, trainer, ids))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the last batch's loss."""
        self._examine(trainer)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Prevent spoilt checkpoints: NonFiniteLoss if a loss or a weight is NaN or infinite."""
        self._examine(trainer)
        if not trainer.strategy.reduce_boolean_decision(_finite(pl_module)):
            raise NonFiniteLoss(f"a weight is NaN or infinite after step {trainer.global_step}{_advice(trainer)}")

    def _examine(self, trainer: Trainer) -> None:
        while self._open:
            verdict = self._open.popleft()
            if verdict.copied is not None:
                verdict.copied.synchronize()
            if verdict.bad:
                self._open.clear()
                ids = [name for names in gathered(verdict.ids if verdict.own else []) for name in names]
                where = f"step {verdict.step}, samples {', '.join(ids) or 'unknown'}"
                raise NonFiniteLoss(f"the loss is NaN or infinite in {where}{_advice(trainer)}")


def _verdict(loss: Tensor, trainer: Trainer, ids: list[str]) -> _Verdict:
    own = ~torch.isfinite(loss.detach()).all()
    bad = own
    if trainer.world_size > 1:
        bad = own.to(torch.int32)
        torch.distributed.all_reduce(bad, torch.distributed.ReduceOp.MAX)
    copied = None
    bad, own = bad.to("cpu", non_blocking=True), own.to("cpu", non_blocking=True)
    if loss.device.type == "cuda":
        copied = torch.cuda.Event()
        copied.record()
    return _Verdict(bad, own, copied, trainer.global_step + accumulating(trainer), ids)


def _finite(module: nn.Module) -> bool:
    """Whether all trained weights of this process are finite."""
    weights = [weight.detach() for weight in module.parameters() if weight.requires_grad]
    # Each process checks only its shards of distributed weights.
    local = [weight.to_local() if hasattr(weight, "to_local") else weight for weight in weights]
    checks = [torch.isfinite(weight).all() for weight in local]
    return bool(torch.stack(checks).all()) if checks else True


def _flat(ids: Any) -> Iterator[str]:
    """The ids of a batch, whose rows may contain several samples."""
    for part in ids:
        if isinstance(part, str):
            yield part
        elif isinstance(part, list | tuple):
            yield from _flat(part)


def _advice(trainer: Trainer) -> str:
    saved = last_good(trainer)
    return f"; the last good checkpoint is {saved}" if saved else "; no checkpoint was saved before it"
