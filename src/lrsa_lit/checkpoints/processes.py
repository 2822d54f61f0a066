"""What the processes of a run tell one another; a run of one process tells itself."""

from __future__ import annotations

from typing import Any

import torch.distributed
from lightning.pytorch import Trainer


def gathered(trainer: Trainer, value: Any) -> list[Any]:
    """The values of all processes by rank. Every process must call it."""
    if trainer.world_size == 1:
        return [value]
    values: list[Any] = [None] * trainer.world_size
    torch.distributed.all_gather_object(values, value)
    return values
