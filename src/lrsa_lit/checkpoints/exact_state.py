"""State that Lightning's checkpoints lack, so that a run can resume as if it had never stopped."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, NamedTuple

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.trainer.states import TrainerFn
from torch.optim import Optimizer

from lrsa_lit.checkpoints import rng
from lrsa_lit.checkpoints.checkpoint_io import CheckpointNotSaved
from lrsa_lit.checkpoints.form import KEY
from lrsa_lit.errors import UserError
from lrsa_lit.lightning_internals import VALIDATED, accumulating, complete_batch, restore_data, validation_is_due
from lrsa_lit.strategies import gathered


class _Boundary(NamedTuple):
    """The state after an optimizer step, from which the same next steps can be repeated."""

    loops: dict[str, Any]
    """Lightning's counters and the positions in the data."""

    random: dict[str, Any]


class ExactState(Callback):
    """Save and restore the random number generators and data positions of every process.

    Whenever it is saved, a checkpoint holds the last boundary between two optimizer steps: the weights have not changed
    since, and the random numbers, the data position and the counters are those of the boundary. The resumed run repeats
    what came after it: a batch or validation that an exception interrupted, and the batches and validations of an
    unfinished step, if the fit was stopped while it accumulated gradients.

    Args:
        settings: the settings of the run by dotted name, to store in its checkpoints.
    """

    def __init__(self, settings: Mapping[str, str] | None = None) -> None:
        self.settings = dict(settings or {})
        self._boundary: _Boundary | None = None
        # The states of other callbacks at the boundary, if a validation may have changed them since.
        self._callbacks: dict[str, Any] = {}
        self._loaded: _Boundary | None = None
        self._max_steps: int | None = None

    @property
    def at_hand(self) -> bool:
        """Whether there is a boundary that can be saved."""
        return self._boundary is not None

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Read this process's part of the checkpoint; a UserError if another number of processes wrote it."""
        state = checkpoint.get(KEY)
        if state is None or trainer.state.fn != TrainerFn.FITTING:
            return
        if (processes := len(state["random"])) != trainer.world_size:
            raise other_processes(processes, trainer.world_size)
        rank, loops = trainer.global_rank, checkpoint["loops"]["fit_loop"]
        loops["state_dict"]["combined_loader"] = state["loaders"][rank]
        self._loaded = _Boundary(loops, state["random"][rank])
        validated = loops[VALIDATED]["total"]
        interrupted = validated["started"] > validated["processed"] and trainer.enable_validation
        if interrupted and 0 <= trainer.max_steps <= checkpoint["global_step"]:
            # The run's last validation was interrupted: Lightning would find all steps done and end at once.
            self._max_steps = trainer.max_steps
            trainer.fit_loop.epoch_loop.max_steps = checkpoint["global_step"] + 1

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore the state, after everything that draws random numbers during setup."""
        if self._loaded is not None:
            restore_data(trainer, self._loaded.loops)
            # These counters mark an interrupted validation, which Lightning has noticed and would repeat forever.
            validated = trainer.fit_loop.epoch_loop.val_loop.batch_progress.total
            validated.ready = validated.started = validated.completed  # type: ignore[attr-defined]
            rng.restore(self._loaded.random, trainer.strategy.root_device)
        self._set_boundary(self._loaded or _look(trainer))
        self._loaded = None

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Drop the boundary: from now until the end of the step, the weights belong to none."""
        self._boundary = None

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Record the boundary after a step."""
        if not accumulating(trainer):
            boundary = _look(trainer)
            complete_batch(boundary.loops, validation_is_due(trainer))
            self._set_boundary(boundary)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let a run end after its last validation; within a step, keep the callbacks' states at the boundary."""
        if self._max_steps is not None:
            trainer.fit_loop.epoch_loop.max_steps, self._max_steps = self._max_steps, None
        if _validating_in_a_fit(trainer) and accumulating(trainer) and not self._callbacks:
            # Except those that save checkpoints, which must remember the files that they have written.
            others = [each for each in trainer.callbacks if not isinstance(each, Checkpoint)]  # type: ignore[attr-defined]
            self._callbacks = {each.state_key: copy.deepcopy(state) for each in others if (state := each.state_dict())}

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record the boundary again, after the validation and with the callbacks' new states."""
        if _validating_in_a_fit(trainer) and not accumulating(trainer):
            self._set_boundary(_look(trainer))

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the state of all processes; CheckpointNotSaved in the middle of an optimizer step."""
        boundary = self._boundary
        if boundary is None:
            if trainer.training:
                raise CheckpointNotSaved("no checkpoint can be saved in the middle of an optimizer step")
            boundary = _look(trainer)
        checkpoint["loops"]["fit_loop"] = boundary.loops
        checkpoint["callbacks"] |= self._callbacks
        checkpoint[KEY] = {
            "random": gathered(boundary.random),
            "loaders": gathered(boundary.loops["state_dict"].get("combined_loader", [])),
            "settings": self.settings,
        }

    def _set_boundary(self, boundary: _Boundary) -> None:
        self._boundary, self._callbacks = boundary, {}


def _look(trainer: Trainer) -> _Boundary:
    """The current state of a run, as a boundary."""
    return _Boundary(trainer.fit_loop.state_dict(), rng.capture(trainer.strategy.root_device))


def other_processes(before: int, now: int) -> UserError:
    """The error for a checkpoint from another number of processes."""
    written = f"it was written by {before} process{'es' * (before > 1)} and cannot be resumed with {now}"
    own = "because each has its own position in the data"
    resume = f"resume with trainer.devices x trainer.num_nodes = {before}"
    hint = f"{resume}, or `lrsa export` it and start a new fit from its weights"
    return UserError("ckpt_path", reason=f"{written}, {own}", hint=hint)


def _validating_in_a_fit(trainer: Trainer) -> bool:
    return trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking
