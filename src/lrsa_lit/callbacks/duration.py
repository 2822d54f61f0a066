"""A notice of how long the first validation will take if it is long: a fit shows nothing else until it is done."""

from __future__ import annotations

import logging
import time
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lrsa_lit.attention import using
from lrsa_lit.models import uncompiled
from lrsa_lit.tasks import LongContextQA

_log = logging.getLogger("lrsa_lit")
LONG = 60.0
"""Seconds; shorter validations get no notice."""

_PIECE = 64
"""Number of tokens that are timed in place of a batch."""


class ValidationDuration(Callback):
    """Log the expected duration of the first long validation, estimated from its first batch.

    On a CPU, this batch alone may take minutes, so the duration is first estimated from the time of a few tokens.
    """

    def __init__(self) -> None:
        self._since: float | None = None
        self._told = False

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any = None, *_: Any, **__: Any
    ) -> None:
        """Start the clock at the first batch; on a CPU, also log an estimate from a few tokens."""
        if self._told or self._since is not None:
            return
        if isinstance(pl_module, LongContextQA) and pl_module.device.type == "cpu":
            self._say(
                _guessed(pl_module, batch), trainer, pl_module, f"estimated from {_PIECE} tokens of its first batch"
            )
        self._since = time.perf_counter()

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any, **__: Any) -> None:
        """Log the duration of all batches, assuming that they are as long as the first."""
        if self._told or self._since is None:
            return
        self._told = True
        self._say(time.perf_counter() - self._since, trainer, pl_module, "estimated from its first batch")

    def _say(self, seconds: float, trainer: Trainer, pl_module: LightningModule, how: str) -> None:
        """Log how long all batches take if one takes ``seconds``."""
        batches = sum(map(int, trainer.num_val_batches))
        if seconds * batches > LONG:
            attentions = len(getattr(pl_module, "attentions", {})) or 1
            of = f"{batches} batches under {attentions} attention{'' if attentions == 1 else 's'}, {how}"
            hint = "for fewer questions, set data.init_args.limit; to skip it before training, --validate_first false"
            _log.info("This validation will take about %s (%s; %s)", _text(seconds * batches), of, hint)


@torch.no_grad()
def _guessed(task: LongContextQA, batch: Any) -> float:
    """Estimated seconds of a batch: one pass for losses and, with answers, a prefill and one pass per new token."""
    ids: Tensor = batch["input_ids"]

    def seconds(tokens: int) -> float:
        begun = time.perf_counter()
        task.model(input_ids=ids[:1, :tokens], use_cache=False)
        return time.perf_counter() - begun

    with using(task.model, None), uncompiled():
        # The first call does one-time initialisation, so it is not timed.
        seconds(1)
        one, piece = seconds(1), seconds(_PIECE)
    each = piece / min(_PIECE, ids.shape[1]) * ids.numel()
    answers = each + task.max_new_tokens * one if task.generate_answers else 0.0
    return len(task.attentions) * (each + answers)


def _text(seconds: float) -> str:
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"
