"""What training a model costs, measured in the loop that trains it."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterable
from typing import Any, NamedTuple, cast

import lightning
import torch
from lightning.pytorch import Callback
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lrsa_lit.checkpoints import exit_codes
from lrsa_lit.cli.estimate.memory import CPUMemory, GPUMemory, Memory, release
from lrsa_lit.tasks import LongContextQA

_REPEATS = 4
"""Steps on each batch that is timed; the first one may prepare what the others use, the fastest of those counts."""


class Cost(NamedTuple):
    """What training costs on one device; seconds, bytes and numbers of weights.

    Attributes:
        parameters: weights of the model.
        trained: those that are trained.
        weights: bytes of the weights.
        gradients: bytes of the gradients.
        optimizer: bytes of the optimizer's state.
        peak_passes: most bytes at a time during forward and backward pass.
        peak_step: most bytes at a time during the optimizer's step.
        pass_seconds: of a forward and backward pass over a batch.
        step_seconds: of the optimizer's step, clipping included.
    """

    parameters: float
    trained: float
    weights: float
    gradients: float
    optimizer: float
    peak_passes: float
    peak_step: float
    pass_seconds: float
    step_seconds: float

    @property
    def peak(self) -> float:
        """Most bytes at a time."""
        return max(self.peak_passes, self.peak_step)


class Batches(NamedTuple):
    """Batches to measure with: the largest for memory, some of ordinary sizes for time."""

    largest: Any
    typical: list[Any]


def measure(task: LongContextQA, batches: Batches, options: dict[str, Any]) -> Cost:
    """Train for some steps, with all layers that the task's model has; the arguments are those of :func:`cost_of`."""
    probe = _Probe()
    # Gradients and the optimizer's state exist from the second step on.
    planned = [batches.largest] * 2 + [batch for batch in batches.typical for _ in range(_REPEATS)]
    trainer = lightning.Trainer(
        **options,
        devices=1,
        max_steps=len(planned),
        callbacks=[probe],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with warnings.catch_warnings(), exit_codes():
        warnings.filterwarnings("ignore", message="You defined a `validation_step` but have no `val_dataloader`")
        trainer.fit(task, DataLoader(cast("Dataset[Any]", planned), batch_size=None))
    cost = probe.cost(task, trainer)
    task.model = None
    del trainer
    release()
    return cost


class _Probe(Callback):
    """Measures memory in the second step, and the seconds of those that follow."""

    def __init__(self) -> None:
        self.passes: list[float] = []
        self.steps: list[float] = []
        self.peaks: list[int] = []
        self._memory: Memory | None = None
        self._since = 0.0

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self._index = batch_idx
        if batch_idx == 1:
            self._memory = GPUMemory() if pl_module.device.type == "cuda" else CPUMemory(pl_module, trainer)
            self._memory.start()
        self._since = _now(pl_module.device)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        now = _now(pl_module.device)
        self.passes.append(now - self._since)
        self._since = now
        if self._index == 1:
            assert self._memory is not None
            self.peaks.append(self._memory.peak())

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.steps.append(_now(pl_module.device) - self._since)
        if batch_idx == 1:
            assert self._memory is not None
            self.peaks.append(self._memory.peak())
            self._memory.stop()

    def cost(self, task: LongContextQA, trainer: lightning.Trainer) -> Cost:
        """What was measured."""
        weights = list(task.model.parameters())
        trained = [weight for weight in weights if weight.requires_grad]
        state = [value for of in trainer.optimizers[0].state.values() for value in of.values()]
        return Cost(
            parameters=sum(weight.numel() for weight in weights),
            trained=sum(weight.numel() for weight in trained),
            weights=_size(weights),
            gradients=_size(trained),
            optimizer=_size(value for value in state if isinstance(value, Tensor)),
            peak_passes=self.peaks[0],
            peak_step=self.peaks[1],
            pass_seconds=_seconds(self.passes[2:]),
            step_seconds=_seconds(self.steps[2:]),
        )


def _seconds(measured: list[float]) -> float:
    """Mean over the batches of the fastest repeat."""
    fastest = [min(measured[first + 1 : first + _REPEATS]) for first in range(0, len(measured), _REPEATS)]
    return sum(fastest) / len(fastest)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _size(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
