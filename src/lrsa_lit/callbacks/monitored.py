"""A metric that a callback watches and that there is not ends a run in one line, at the first validation."""

from __future__ import annotations

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping

from lrsa_lit.errors import UserError


class MonitoredMetrics(Callback):
    """Refuse a ``monitor`` that is no metric, once a validation says which there are.

    It stands before the callbacks that it looks at: EarlyStopping would end the run with a traceback.
    """

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Raise a UserError if a callback watches a metric that there is not."""
        if trainer.sanity_checking:
            return
        known = list(trainer.callback_metrics)
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            monitor = getattr(callback, "monitor", None)
            if monitor is None or monitor in known or not getattr(callback, "strict", True):
                continue
            # A training may log others later, for which a checkpoint can wait and EarlyStopping does not.
            if monitor.startswith("val/") or (trainer.state.fn == "fit" and isinstance(callback, EarlyStopping)):
                told = f"{type(callback).__name__} cannot monitor {monitor!r}; there are {', '.join(known)}"
                raise UserError("callbacks", reason=told)
