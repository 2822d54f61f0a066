"""Numbers of the host on a device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def to_device(numbers: Any, device: torch.device) -> Tensor:
    """A tensor of numbers of the host, which are sequences or a tensor. It does not make the host wait for a GPU.

    CUDA has read them when this returns, so a tensor may be freed at once.
    """
    return torch.as_tensor(numbers, device="cpu").to(device, non_blocking=True)
