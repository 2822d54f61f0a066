"""How long the first validation will take, where that is long: a fit shows nothing else before it is done."""

from __future__ import annotations

import logging
import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

_log = logging.getLogger("lrsa_lit")
LONG = 60.0
"""Seconds; a shorter validation needs no word."""


class ValidationDuration(Callback):
    """Log the expected duration of the first long validation, judged by its first batch."""

    def __init__(self) -> None:
        self._since: float | None = None
        self._told = False

    def on_validation_batch_start(self, trainer: Trainer, *_: Any, **__: Any) -> None:
        """Note when the first batch begins."""
        if not self._told and self._since is None:
            self._since = time.perf_counter()

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any, **__: Any) -> None:
        """Tell what the other batches will take, if they are as long."""
        if self._told or self._since is None:
            return
        self._told = True
        batches, seconds = sum(map(int, trainer.num_val_batches)), time.perf_counter() - self._since
        if seconds * batches > LONG:
            attentions = len(getattr(pl_module, "attentions", {})) or 1
            of = f"{batches} batches under {attentions} attention{'' if attentions == 1 else 's'}"
            hint = "fewer questions: data.init_args.limit; none before training: --validate_first false"
            _log.info("This validation will take about %s (%s; %s)", _text(seconds * batches), of, hint)


def _text(seconds: float) -> str:
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"
