"""How long the first validation will take, where that is long: a fit shows nothing else before it is done."""

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
"""Seconds; a shorter validation needs no word."""

_PIECE = 64
"""Tokens that are timed in place of a batch."""


class ValidationDuration(Callback):
    """Log the expected duration of the first long validation, judged by its first batch.

    On a CPU that batch may take minutes itself, so before it the duration is guessed from the time of a few tokens.
    """

    def __init__(self) -> None:
        self._since: float | None = None
        self._told = False

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any = None, *_: Any, **__: Any
    ) -> None:
        """Note when the first batch begins; on a CPU, guess what it and the others will take."""
        if self._told or self._since is not None:
            return
        if isinstance(pl_module, LongContextQA) and pl_module.device.type == "cpu":
            self._say(
                _guessed(pl_module, batch), trainer, pl_module, f"guessed from {_PIECE} tokens of its first batch"
            )
        self._since = time.perf_counter()

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any, **__: Any) -> None:
        """Tell what the other batches will take, if they are as long."""
        if self._told or self._since is None:
            return
        self._told = True
        self._say(time.perf_counter() - self._since, trainer, pl_module, "judged by its first batch")

    def _say(self, seconds: float, trainer: Trainer, pl_module: LightningModule, how: str) -> None:
        """Log what all batches take, if one takes so long."""
        batches = sum(map(int, trainer.num_val_batches))
        if seconds * batches > LONG:
            attentions = len(getattr(pl_module, "attentions", {})) or 1
            of = f"{batches} batches under {attentions} attention{'' if attentions == 1 else 's'}, {how}"
            hint = "fewer questions: data.init_args.limit; none before training: --validate_first false"
            _log.info("This validation will take about %s (%s; %s)", _text(seconds * batches), of, hint)


@torch.no_grad()
def _guessed(task: LongContextQA, batch: Any) -> float:
    """Seconds of a batch: a pass for its losses and, with answers, one more to read prompts, then token by token."""
    ids: Tensor = batch["input_ids"]

    def seconds(tokens: int) -> float:
        begun = time.perf_counter()
        task.model(input_ids=ids[:1, :tokens], use_cache=False)
        return time.perf_counter() - begun

    with using(task.model, None), uncompiled():
        # The first call makes what others find.
        seconds(1)
        one, piece = seconds(1), seconds(_PIECE)
    each = piece / min(_PIECE, ids.shape[1]) * ids.numel()
    answers = each + task.max_new_tokens * one if task.generate_answers else 0.0
    return len(task.attentions) * (each + answers)


def _text(seconds: float) -> str:
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"
