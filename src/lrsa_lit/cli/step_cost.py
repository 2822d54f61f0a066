"""The cost of a training step in seconds and bytes, measured in the real training loop."""

from __future__ import annotations

import gc
import time
import warnings
import weakref
from collections.abc import Iterable
from typing import Any, NamedTuple, cast

import lightning
import torch
from lightning.pytorch import Callback
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, Dataset

from lrsa_lit.tasks import LongContextQA

_REPEATS = 4
"""Steps on each timed batch; the first one is a warm-up, and the fastest of the others counts."""


class Cost(NamedTuple):
    """The cost of training on one device.

    Attributes:
        parameters, trained: numbers of all weights, and of the trained ones.
        weights, gradients, optimizer: bytes of weights, of gradients, and of the optimizer's state.
        peak_passes, peak_step: peak bytes during the passes over a batch, and during the optimizer's step.
        pass_seconds, step_seconds: seconds of a forward and backward pass, and of the optimizer's step with clipping.
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
        """Peak bytes."""
        return max(self.peak_passes, self.peak_step)


class Batches(NamedTuple):
    """Batches to measure with: the largest for memory, some of typical sizes for time."""

    largest: Any
    typical: list[Any]


def measure(task: LongContextQA, batches: Batches, options: dict[str, Any]) -> Cost:
    """Train a task, whose model is not loaded yet, for some steps; ``options`` are for Lightning's Trainer."""
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
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="You defined a `validation_step` but have no `val_dataloader`")
        trainer.fit(task, DataLoader(cast("Dataset[Any]", planned), batch_size=None))
    weights = list(task.model.parameters())
    trained = [weight for weight in weights if weight.requires_grad]
    cost = Cost(
        parameters=sum(map(torch.numel, weights)),
        trained=sum(map(torch.numel, trained)),
        weights=_size(weights),
        gradients=_size(trained),
        optimizer=_size(_optimizer_state(trainer)),
        peak_passes=probe.peaks[0],
        peak_step=probe.peaks[1],
        pass_seconds=_seconds(probe.passes[2:]),
        step_seconds=_seconds(probe.steps[2:]),
    )
    task.model = None
    del trainer, weights, trained
    release()
    return cost


def release() -> None:
    """Free memory that nothing refers to any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class _Probe(Callback):
    """Measures the memory of the second step and the seconds of each step."""

    def __init__(self) -> None:
        self.passes: list[float] = []
        self.steps: list[float] = []
        self.peaks: list[int] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self._memory: _GPUMemory | _CPUMemory | None = None
        if batch_idx == 1:
            held = [*pl_module.parameters(), *pl_module.buffers(), *_optimizer_state(trainer)]
            held += [weight.grad for weight in pl_module.parameters() if weight.grad is not None]
            self._memory = _GPUMemory() if pl_module.device.type == "cuda" else _CPUMemory(held)
        self._since = _now(pl_module.device)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        now = _now(pl_module.device)
        self.passes.append(now - self._since)
        self._since = now
        if self._memory is not None:
            self.peaks.append(self._memory.peak())

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.steps.append(_now(pl_module.device) - self._since)
        if self._memory is not None:
            self.peaks.append(self._memory.peak())
            self._memory.stop()


class _GPUMemory:
    """Peak bytes of PyTorch's allocator, from now on."""

    def __init__(self) -> None:
        torch.cuda.reset_peak_memory_stats()

    def peak(self) -> int:
        """Peak bytes since the last call."""
        found = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return found

    def stop(self) -> None:
        """Do nothing."""


class _CPUMemory(TorchDispatchMode):
    """Peak bytes of the storages of all tensors that operations return; a process's memory is too coarse a measure.

    Buffers within operations do not count. On a CPU, backward passes run in the calling thread, so this mode sees them
    too.
    """

    def __init__(self, held: Iterable[Tensor]) -> None:
        super().__init__()
        self._held: set[int] = set()
        self._now = self._peak = 0
        self._note(held)
        self.__enter__()

    def peak(self) -> int:
        found, self._peak = self._peak, self._now
        return found

    def stop(self) -> None:
        self.__exit__(None, None, None)

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        made = function(*args, **(kwargs or {}))
        self._note(value for value in torch.utils._pytree.tree_leaves(made) if isinstance(value, Tensor))
        return made

    def _note(self, tensors: Iterable[Tensor]) -> None:
        for tensor in tensors:
            storage = tensor.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            if key not in self._held:
                self._held.add(key)
                self._now += size
                self._peak = max(self._peak, self._now)
                weakref.finalize(storage, self._freed, key, size)

    def _freed(self, key: int, size: int) -> None:
        self._held.discard(key)
        self._now -= size


def _optimizer_state(trainer: Any) -> list[Tensor]:
    state = [value for of in trainer.optimizers[0].state.values() for value in of.values()]
    return [value for value in state if isinstance(value, Tensor)]


def _seconds(measured: list[float]) -> float:
    """Mean over batches of the seconds of each one's fastest repeat."""
    fastest = [min(measured[first + 1 : first + _REPEATS]) for first in range(0, len(measured), _REPEATS)]
    return sum(fastest) / len(fastest)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _size(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)
