"""A run ends where its loss is NaN or infinite, before anything of it is saved."""

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
    """What is known about a batch of an optimizer step (counted from 1), once the device has come to it.

    Attributes:
        bad: () bool on the CPU, whether some process's loss was not finite; being copied until ``copied``.
        own: the same of this process's loss.
        copied: the event of the copies; None on the CPU.
    """

    bad: Tensor
    own: Tensor
    copied: torch.cuda.Event | None
    step: int
    ids: list[str]


class FiniteLoss(Callback):
    """Stop with the step and the sample ids of the batch whose loss is not finite.

    The loss of a batch is looked at when the next one has been submitted, so that the device never waits: one step more
    may be taken with spoilt weights. Saving a checkpoint looks at all losses until then, and at the weights.
    """

    def __init__(self) -> None:
        self._open: deque[_Verdict] = deque()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget a run before this one."""
        self._open.clear()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *_: Any
    ) -> None:
        """Look at the loss of the batch before (NonFiniteLoss ends the run), and start copying that of this one."""
        self._examine(trainer)
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        if isinstance(loss, Tensor):
            ids = list(_flat(batch.get("id", []))) if isinstance(batch, dict) else []
            self._open.append(_verdict(loss, trainer, ids))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at the last batch's."""
        self._examine(trainer)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Let nothing be saved that is spoilt: NonFiniteLoss if a loss, or a weight, is NaN or infinite."""
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
    # A shard of a distributed weight answers for itself.
    local = [weight.to_local() if hasattr(weight, "to_local") else weight for weight in weights]
    checks = [torch.isfinite(weight).all() for weight in local]
    return bool(torch.stack(checks).all()) if checks else True


def _flat(ids: Any) -> Iterator[str]:
    """The ids of a batch, whose rows may be of several samples."""
    for part in ids:
        if isinstance(part, str):
            yield part
        elif isinstance(part, list | tuple):
            yield from _flat(part)


def _advice(trainer: Trainer) -> str:
    saved = last_good(trainer)
    return f"; the last good checkpoint is {saved}" if saved else "; no checkpoint was saved before it"
