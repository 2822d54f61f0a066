"""A record of a training: losses, speed, and a digest of the trained weights."""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lrsa_lit.io import write_atomically
from lrsa_lit.models.checkpoint import trained_weights
from lrsa_lit.strategies import sharing_devices
from lrsa_lit.tasks import LongContextQA
from lrsa_lit.tracking.machine import describe

_WARM_UP = 5
"""Number of batches after each start that are not part of the measured speed, because they compile kernels."""

_EVERY = 10
"""Synchronise with the device every this many batches."""


class TrainingRecord(Callback):
    """Write a JSON file when a fit reaches its last step; a resumed fit continues the earlier record.

    The file has ``steps``, ``losses`` (the objective's, of each batch), ``tokens_per_second`` (with padding, without
    the first few batches of each start; null if there were no others), ``peak_memory_bytes`` (of a GPU, else null),
    ``seconds``, ``weights`` (a digest of all bits of the trained weights, twelve hex digits) and ``machine``.

    Args:
        path: the file; an existing one is replaced.
    """

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        self._losses: list[float] = []
        self._tokens, self._seconds, self._wall = 0, 0.0, 0.0
        self._pending: list[Tensor] = []
        self._batches, self._queued, self._since = 0, 0, 0.0

    def state_dict(self) -> dict[str, Any]:
        """The record so far, for a checkpoint; batches since the last synchronisation have no measured time."""
        losses = [*self._losses, *(float(loss) for loss in self._pending)]
        return {"losses": losses, "tokens": self._tokens, "seconds": self._seconds, "wall": self._wall}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue the record of a checkpoint."""
        self._losses = list(state_dict["losses"])
        self._tokens, self._seconds, self._wall = (state_dict[name] for name in ("tokens", "seconds", "wall"))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._since = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *_: Any
    ) -> None:
        """Count a batch."""
        self._batches += 1
        self._pending.append(trainer.callback_metrics["train/loss"].detach().clone())
        self._queued += batch["input_ids"].numel() // sharing_devices(pl_module.device_mesh)
        last = trainer.global_step == trainer.max_steps
        if last or self._batches == _WARM_UP or self._batches % _EVERY == 0:
            self._read(pl_module.device)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the file on the first process."""
        if trainer.global_step < trainer.max_steps or not isinstance(pl_module, LongContextQA):
            return
        trained = pl_module.model if pl_module.digests is None else pl_module
        weights = digest_of(trained_weights(pl_module.backbone, trained))
        cuda = pl_module.device.type == "cuda"
        about = {
            "steps": trainer.global_step,
            "losses": self._losses,
            "tokens_per_second": self._tokens / self._seconds if self._seconds else None,
            "peak_memory_bytes": torch.cuda.max_memory_allocated(pl_module.device) if cuda else None,
            "seconds": round(self._wall, 1),
            "weights": weights,
            "machine": describe(),
        }
        if trainer.is_global_zero:
            text = json.dumps(about) + "\n"
            write_atomically(self.path, lambda file: file.write(text.encode()))

    def _read(self, device: torch.device) -> None:
        """Synchronise with the device, and read the clock and the pending losses."""
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        passed = time.perf_counter() - self._since
        self._wall += passed
        if self._batches > _WARM_UP:
            self._tokens += self._queued
            self._seconds += passed
        self._since, self._queued = time.perf_counter(), 0
        self._losses += [float(loss) for loss in self._pending]
        self._pending.clear()


def digest_of(weights: dict[str, Tensor]) -> str:
    """Digest of the names and all bits of weights: twelve hex digits."""
    found = hashlib.sha256()
    for name, weight in sorted(weights.items()):
        found.update(name.encode())
        found.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:12]
