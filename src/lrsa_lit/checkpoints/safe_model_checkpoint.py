"""Lightning's ModelCheckpoint, changed so that runs can resume exactly."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from lrsa_lit.checkpoints.checkpoint_io import CheckpointNotSaved, NonFiniteLoss, claim, release, system_error
from lrsa_lit.checkpoints.form import check_form
from lrsa_lit.checkpoints.stop import StoppedByUser, Terminated
from lrsa_lit.errors import UserError, message_of
from lrsa_lit.lightning_internals import OpenModelCheckpoint, accumulating, is_local, validation_is_due

_log = logging.getLogger("lrsa_lit.checkpoints")


class SafeModelCheckpoint(OpenModelCheckpoint):
    """ModelCheckpoint that saves only between optimizer steps and handles errors while saving.

    A checkpoint that is due between the batches of a step is saved after the step. If a validation follows, it is saved
    after the validation. Before each save, the loggers write what was logged so far. A run that ends after its last
    validation also saves its end as ``last``.

    Args:
        on_save_error: what happens if a checkpoint cannot be written: ``stop`` ends the run, ``continue`` logs a
            warning. Earlier checkpoints are kept in both cases.
        kwargs: arguments of :class:`lightning.pytorch.callbacks.ModelCheckpoint`.
    """

    def __init__(self, on_save_error: Literal["stop", "continue"] = "stop", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if on_save_error not in ("stop", "continue"):
            raise UserError("on_save_error", on_save_error, "stop or continue")
        self.on_save_error = on_save_error
        self._put_off = self._due = self._between_steps = False

    @property
    def last_good(self) -> str:
        """The checkpoint to resume from; empty if there is none."""
        return self.saved or self.last_model_path

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the folder and claim it, so that no other run resumes from its checkpoints while this run writes."""
        super().setup(trainer, pl_module, stage)
        writes = stage == "fit" and trainer.is_global_zero and not trainer.fast_dev_run  # type: ignore[attr-defined]
        if writes and self.dirpath is not None and is_local(self.dirpath):
            claim(Path(self.dirpath))

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Release the folder, so that other runs can resume from its checkpoints."""
        super().teardown(trainer, pl_module, stage)
        if stage == "fit":
            self._release()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state, including a value that Lightning forgets; a UserError if it is malformed."""
        score, scores = self.kth_value, state_dict["best_k_models"]
        check_form(scores, dict.fromkeys(scores, score), "callbacks.SafeModelCheckpoint.best_k_models")
        for name in ("best_model_score", "current_score"):
            if state_dict[name] is not None:
                check_form(state_dict[name], score, f"callbacks.SafeModelCheckpoint.{name}")
        super().load_state_dict(state_dict)
        self.current_score = state_dict["current_score"]

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        """Save what the previous batch made due; its metrics are recorded only now."""
        if self._between_steps:
            self._save_due(trainer)
        self._between_steps = False

    def on_train_batch_end(self, trainer: Trainer, *arguments: Any) -> None:
        """Check whether a checkpoint is due, and when it can be saved."""
        if accumulating(trainer):
            return
        with self._putting_off():
            super().on_train_batch_end(trainer, *arguments)
        if self._due and validation_is_due(trainer):
            self.save_after_validation()
            self._due = False
        self._between_steps = True

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save what the last batch, the epoch or the end of the fit made due."""
        self._save_due(trainer)
        super().on_train_epoch_end(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save if due, or, if a step is in progress, after that step."""
        within_a_step = trainer.state.fn == "fit" and not trainer.sanity_checking and accumulating(trainer)
        with self._putting_off() if within_a_step else nullcontext():
            super().on_validation_end(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the end of the run, unless it was saved already."""
        self._save_due(trainer)
        if self.save_last and not self.nothing_to_save(trainer):
            self.save_end(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save the last boundary between two steps, unless it cannot be trusted."""
        # Saving needs all processes, and of all exceptions only a stop is certain to reach all of them.
        alone = trainer.world_size == 1 or isinstance(exception, StoppedByUser | Terminated)
        trusted = alone and not isinstance(exception, CheckpointNotSaved | NonFiniteLoss)
        try:
            if trusted and self.saves_on_exception(trainer):
                if self.save_last:
                    self.save_end(trainer, booked=False)
                else:
                    self.write(trainer, self.format_checkpoint_name(self.metrics(trainer)))
        except (CheckpointNotSaved, NonFiniteLoss) as error:
            # The exception ends the run; the missing checkpoint is only logged.
            _log.warning("%s", error)
        finally:
            # Lightning does not call teardown after a failed fit.
            self._release()

    def _release(self) -> None:
        if self.dirpath is not None and is_local(self.dirpath):
            release(Path(self.dirpath))

    def _save_due(self, trainer: Trainer) -> None:
        if self._due:
            self._due = False
            self.save_best(trainer)

    def book(self, save: Callable[[Trainer, dict[str, Tensor]], None], trainer: Trainer, metrics: Any) -> None:
        """Save with Lightning's bookkeeping, and undo the bookkeeping on failure; CheckpointNotSaved ends the run."""
        if self._put_off:
            self._due = True
            return
        before = vars(self) | {"best_k_models": dict(self.best_k_models)}
        try:
            save(trainer, metrics)
        except CheckpointNotSaved as error:
            vars(self).update(before)
            kept = f"; {self.last_good} is intact" if self.last_good else ""
            if self.on_save_error == "stop":
                raise CheckpointNotSaved(f"{error}{kept}") from error
            _log.warning("%s%s; training continues", error, kept)

    def write(self, trainer: Trainer, path: str) -> None:
        """Write a checkpoint; CheckpointNotSaved on every process if it fails on any."""
        failure = None
        for logger in trainer.loggers:
            # If the run is killed, it resumes after the checkpoint, so all earlier metrics must be written now.
            logger.save()
        try:
            super().write(trainer, path)
        except CheckpointNotSaved as error:
            failure = error
        except (OSError, CheckpointException) as error:
            # From a strategy that writes a folder of shards, on all processes.
            failure = CheckpointNotSaved(f"checkpoint {path}: not saved ({_reason(error)})")
        if failure is not None:
            # The processes that had nothing to write wait here.
            trainer.strategy.barrier("Trainer.save_checkpoint")
        message = trainer.strategy.broadcast(failure and str(failure))
        if message is not None:
            raise failure or CheckpointNotSaved(str(message))

    @contextmanager
    def _putting_off(self) -> Iterator[None]:
        self._put_off = True
        try:
            yield
        finally:
            self._put_off = False


def _reason(error: OSError | CheckpointException) -> str:
    failures = error.failures.values() if isinstance(error, CheckpointException) else [(error, None)]
    causes = [system_error(cause) for cause, _ in failures]
    return next((cause.strerror for cause in causes if cause and cause.strerror), message_of(error))


def last_good(trainer: Trainer) -> str:
    """The checkpoint that a run can resume from; empty if there is none."""
    found = (each.last_good for each in trainer.checkpoint_callbacks if isinstance(each, SafeModelCheckpoint))
    return next(filter(None, found), str(trainer.ckpt_path or ""))
