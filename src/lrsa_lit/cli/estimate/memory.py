"""How many bytes tensors take at a time, on a GPU and on a CPU."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class GPUMemory:
    """What PyTorch's allocator has handed out."""

    def start(self) -> None:
        """Count from now on."""
        torch.cuda.reset_peak_memory_stats()

    def peak(self) -> int:
        """Most bytes at a time since the last call."""
        found = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return found

    def stop(self) -> None:
        """There is nothing to take back."""


class CPUMemory(TorchDispatchMode):
    """The storages of all tensors that operations return; the process itself is too coarse a measure.

    Buffers within operations do not count. Backward passes of a CPU run in the thread that asks for them, and so under
    this mode, too.
    """

    def __init__(self, module: Any, trainer: Any) -> None:
        super().__init__()
        self._held: set[int] = set()
        self._now = self._peak = 0
        state = [value for of in trainer.optimizers[0].state.values() for value in of.values()]
        gradients = [weight.grad for weight in module.parameters()]
        self._note([*module.parameters(), *module.buffers(), *gradients, *state])

    def start(self) -> None:
        """Count from now on."""
        self.__enter__()

    def stop(self) -> None:
        """Count no longer."""
        self.__exit__(None, None, None)

    def peak(self) -> int:
        """Most bytes at a time since the last call."""
        found, self._peak = self._peak, self._now
        return found

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        made = function(*args, **(kwargs or {}))
        self._note(torch.utils._pytree.tree_leaves(made))
        return made

    def _note(self, values: Sequence[Any]) -> None:
        for value in values:
            if not isinstance(value, Tensor):
                continue
            storage = value.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            if key not in self._held:
                self._held.add(key)
                self._now += size
                self._peak = max(self._peak, self._now)
                weakref.finalize(storage, self._freed, key, size)

    def _freed(self, key: int, size: int) -> None:
        self._held.discard(key)
        self._now -= size


Memory = GPUMemory | CPUMemory


def release() -> None:
    """Give back what nobody refers to any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
