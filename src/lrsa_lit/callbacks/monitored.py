"""A check, at the first validation, that the metrics that callbacks monitor exist."""

from __future__ import annotations

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping

from lrsa_lit.errors import UserError


class MonitoredMetrics(Callback):
    """Raise a UserError for a ``monitor`` that is not a metric, once a validation shows which metrics exist.

    It must come before the callbacks that it checks, because EarlyStopping would end the run with a traceback.
    """

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Raise a UserError if a callback monitors a metric that does not exist."""
        if trainer.sanity_checking:
            return
        known = list(trainer.callback_metrics)
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            monitor = getattr(callback, "monitor", None)
            if monitor is None or monitor in known or not getattr(callback, "strict", True):
                continue
            # Training may log other metrics later. A checkpoint callback can wait for them; EarlyStopping does not.
            if monitor.startswith("val/") or (trainer.state.fn == "fit" and isinstance(callback, EarlyStopping)):
                told = f"{type(callback).__name__} cannot monitor {monitor!r}; metrics are {', '.join(known)}"
                raise UserError("callbacks", reason=told)
