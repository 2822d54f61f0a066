"""What Lightning's checkpoints lack for a run to go on as if it had never stopped."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, NamedTuple

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.trainer.states import TrainerFn
from torch.optim import Optimizer

from lrsa_lit.checkpoints import rng
from lrsa_lit.checkpoints.errors import CheckpointNotSaved
from lrsa_lit.checkpoints.processes import gathered
from lrsa_lit.errors import UserError

KEY = "exact_state"
"""Where a checkpoint keeps it."""

_LOGGED = "epoch_loop.state_dict"
_BATCHES = "epoch_loop.batch_progress"
_VALIDATED = "epoch_loop.val_loop.batch_progress"


class Boundary(NamedTuple):
    """The moment after an optimizer step: from here, the same steps can be taken again.

    Attributes:
        loops: Lightning's counters, and the positions in the data.
        random: the states of the random number generators.
    """

    loops: dict[str, Any]
    random: dict[str, Any]


class ExactState(Callback):
    """Save and restore random number generators and positions in the data, of every process.

    Every checkpoint holds the last boundary between two optimizer steps, whenever it is saved: the weights have not
    changed since, and the random numbers, the position in the data and the counters are those of the boundary. What
    came after it is done again by the resumed run: a batch or a validation that an exception interrupted, and the
    batches and validations of a step that was not finished, because the fit was stopped while it accumulated gradients.

    Args:
        settings: the settings of the run by dotted name, to be kept in its checkpoints.
    """

    def __init__(self, settings: Mapping[str, str] | None = None) -> None:
        self.settings = dict(settings or {})
        self._boundary: Boundary | None = None
        # Of other callbacks at the boundary, where a validation has changed them since.
        self._callbacks: dict[str, Any] = {}
        self._loaded: Boundary | None = None
        self._max_steps: int | None = None

    @property
    def at_hand(self) -> bool:
        """Whether there is a boundary to save."""
        return self._boundary is not None

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Take this process's part of the checkpoint.

        Raises:
            UserError: it is of another number of processes.
        """
        state = checkpoint.get(KEY)
        if state is None or trainer.state.fn != TrainerFn.FITTING:
            return
        if (processes := len(state["random"])) != trainer.world_size:
            raise UserError(other_processes(processes, trainer.world_size))
        rank, loops = trainer.global_rank, checkpoint["loops"]["fit_loop"]
        loops["state_dict"]["combined_loader"] = state["loaders"][rank]
        self._loaded = Boundary(loops, state["random"][rank])
        waits = _validation_waits(loops) and trainer.enable_validation
        if waits and 0 <= trainer.max_steps <= checkpoint["global_step"]:
            # The last validation of a run: Lightning would find all steps done and end at once.
            self._max_steps = trainer.max_steps
            trainer.fit_loop.epoch_loop.max_steps = checkpoint["global_step"] + 1

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore, once everything is in place that draws random numbers while it is built."""
        if self._loaded is not None:
            _restore_data(trainer, self._loaded.loops)
            # These counters mark an interrupted validation, which Lightning has noticed and would for ever repeat.
            validated = trainer.fit_loop.epoch_loop.val_loop.batch_progress.total
            validated.ready = validated.started = validated.completed  # type: ignore[attr-defined]
            rng.restore(self._loaded.random, trainer.strategy.root_device)
        self._set_boundary(self._loaded or look(trainer))
        self._loaded = None

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """From here on, and until the step is over, the weights belong to no boundary."""
        self._boundary = None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Look at the boundary after a step."""
        if accumulating(trainer):
            return
        boundary = look(trainer)
        _complete_batch(boundary.loops, validation_is_due(trainer))
        self._set_boundary(boundary)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let a run end after its last validation; keep what callbacks knew at a boundary that will not know of it."""
        if self._max_steps is not None:
            trainer.fit_loop.epoch_loop.max_steps, self._max_steps = self._max_steps, None
        if _validating_in_a_fit(trainer) and accumulating(trainer) and not self._callbacks:
            self._callbacks = _states(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look again: the validation is done, and callbacks have counted it."""
        if _validating_in_a_fit(trainer) and not accumulating(trainer):
            self._set_boundary(look(trainer))

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the state of all processes.

        Raises:
            CheckpointNotSaved: there is no boundary to save, in the middle of an optimizer step.
        """
        boundary = self._boundary
        if boundary is None:
            if trainer.training:
                raise CheckpointNotSaved("no checkpoint of this moment: it is in the middle of an optimizer step")
            boundary = look(trainer)
        checkpoint["loops"]["fit_loop"] = boundary.loops
        checkpoint["callbacks"] |= self._callbacks
        checkpoint[KEY] = {
            "random": gathered(trainer, boundary.random),
            "loaders": gathered(trainer, boundary.loops["state_dict"].get("combined_loader", [])),
            "settings": self.settings,
        }

    def _set_boundary(self, boundary: Boundary) -> None:
        self._boundary, self._callbacks = boundary, {}


def look(trainer: Trainer) -> Boundary:
    """The boundary that a run is at now."""
    return Boundary(trainer.fit_loop.state_dict(), rng.capture(trainer.strategy.root_device))


def accumulating(trainer: Trainer) -> bool:
    """Whether gradients of the last batch wait for those of further ones."""
    return trainer.fit_loop.epoch_loop._should_accumulate()


def validation_is_due(trainer: Trainer) -> bool:
    """Whether a validation follows on the last batch."""
    fetcher = trainer.fit_loop._data_fetcher
    return fetcher is not None and trainer.fit_loop.epoch_loop._should_check_val_fx(fetcher)


def other_processes(before: int, now: int) -> str:
    """What to say of a checkpoint of another number of processes."""
    return (
        f"ckpt_path: it was written by {before} process{'es' * (before > 1)} and cannot go on with {now}, as each has "
        f"its own position in the data; resume with trainer.devices x trainer.num_nodes = {before}, or `lrsa export` "
        "it and start a new fit from its weights"
    )


def _validating_in_a_fit(trainer: Trainer) -> bool:
    return trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking


def _states(trainer: Trainer) -> dict[str, Any]:
    """What callbacks save, but for those that save checkpoints: they must know the files that they have written."""
    others = [callback for callback in trainer.callbacks if not isinstance(callback, Checkpoint)]  # type: ignore[attr-defined]
    return {callback.state_key: copy.deepcopy(state) for callback in others if (state := callback.state_dict())}


def _complete_batch(loops: dict[str, Any], validation_follows: bool) -> None:
    """Count a batch as complete, as Lightning will in a moment, and a validation after it as interrupted at its start.

    Lightning itself treats what was saved here, before that moment, as if the validation had been done.
    """
    batches, validated = loops[_BATCHES], loops[_VALIDATED]
    for progress in (batches["total"], batches["current"]):
        progress["completed"] = progress["processed"]
    if not validation_follows:
        loops[_LOGGED]["_batches_that_stepped"] += 1
        return
    done = validated["total"]["completed"]
    validated["total"].update(ready=done + 1, started=done + 1, processed=done)
    validated["current"].update(ready=1, started=1, processed=0, completed=0)


def _validation_waits(loops: dict[str, Any]) -> bool:
    """Whether counters are those of an interrupted validation."""
    validated = loops[_VALIDATED]["total"]
    return bool(validated["started"] > validated["processed"])


def _restore_data(trainer: Trainer, loops: dict[str, Any]) -> None:
    """See to the position in the data, where Lightning does not."""
    loop = trainer.fit_loop
    loader, fetcher = loop._combined_loader, loop._data_fetcher
    assert loader is not None
    assert fetcher is not None
    if loop._combined_loader_states_to_load:
        # Something asked for the data before the checkpoint was restored, as trainer.estimated_stepping_batches does;
        # Lightning then forgets the position.
        loop._load_combined_loader_states()
        iter(fetcher)
    if loops[_BATCHES]["is_last_batch"]:
        # The epoch has no batch left, but what remains of it, a validation maybe, is still to be done. Loaders whose
        # state is at the end of an epoch begin the next one: not now, but when Lightning asks for it.
        exhausted = loader._iterator
        loader.reset()
        loader._load_state_dicts(loops["state_dict"]["combined_loader"])
        fetcher.iterator = iter(())
        # If no epoch follows, Lightning still asks for the number of batches.
        loader._iterator = exhausted
