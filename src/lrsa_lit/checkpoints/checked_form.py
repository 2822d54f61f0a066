"""Hold a checkpoint to the form that this run would write, before Lightning and other callbacks read it."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn

from lrsa_lit.checkpoints import rng
from lrsa_lit.checkpoints.exact_state import KEY
from lrsa_lit.checkpoints.form import check_form, check_optimizer
from lrsa_lit.errors import UserError

_NEEDED = ("loops", "optimizer_states", "lr_schedulers")
"""What Lightning writes into every checkpoint but those of weights alone."""


class CheckedForm(Callback):
    """Refuse a checkpoint of another form; it stands before the callbacks that read one."""

    def __init__(self) -> None:
        self._checkpoint: dict[str, Any] | None = None

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Check all but what the optimizers go on from, which are not made yet.

        Raises:
            UserError: a part is missing or of another form.
        """
        _check_callbacks(trainer, checkpoint)
        if trainer.state.fn == TrainerFn.FITTING:
            self._checkpoint = checkpoint
            _check_loops(trainer, checkpoint)
            _check_exact_state(trainer, checkpoint.get(KEY))

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check what the optimizers and their schedules go on from, now that they are made.

        Raises:
            UserError: it is of others.
        """
        checkpoint, self._checkpoint = self._checkpoint, None
        if checkpoint is not None:
            _check_optimizers(trainer, checkpoint)


def _check_callbacks(trainer: Trainer, checkpoint: dict[str, Any]) -> None:
    found = checkpoint.get("callbacks", {})
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if callback.state_key in found:
            check_form(found[callback.state_key], callback.state_dict(), f"callbacks.{type(callback).__name__}")


def _check_loops(trainer: Trainer, checkpoint: dict[str, Any]) -> None:
    if lacking := [name for name in _NEEDED if name not in checkpoint]:
        raise UserError(
            f"ckpt_path: it has no {lacking[0]}, as if saved with save_weights_only; a fit goes on from a whole "
            "checkpoint, and `lrsa export` makes a model to start from of this one"
        )
    check_form(checkpoint["loops"].get("fit_loop", ()), trainer.fit_loop.state_dict(), "loops.fit_loop")


def _check_optimizers(trainer: Trainer, checkpoint: dict[str, Any]) -> None:
    # A sharded checkpoint holds them as tensors by name, which its reader compares.
    for number, (state, own) in enumerate(zip(checkpoint["optimizer_states"], trainer.optimizers, strict=False)):
        weights = [weight for group in own.param_groups for weight in group["params"]]
        check_optimizer(state, own.state_dict(), weights, f"optimizer_states.{number}")
    schedules = (config.scheduler.state_dict() for config in trainer.lr_scheduler_configs)
    for number, (state, made) in enumerate(zip(checkpoint["lr_schedulers"], schedules, strict=False)):
        check_form(state, made, f"lr_schedulers.{number}")


def _check_exact_state(trainer: Trainer, state: dict[str, Any] | None) -> None:
    # That of another number of processes is refused with advice, by who reads it.
    if state is None or len(state["random"]) != trainer.world_size:
        return
    rank = trainer.global_rank
    rng.check(state["random"][rank], trainer.strategy.root_device, f"{KEY}.random.{rank}")
    check_form(state.get("loaders", ()), [[{}]] * trainer.world_size, f"{KEY}.loaders")
