"""Numbers that processes must agree on if every call of the model needs all of them, as with sharded weights."""

from __future__ import annotations

import torch


def most_of_all(count: int, device: torch.device) -> int:
    """The maximum count over all processes. Each process calls this with its own count and device."""
    most = torch.tensor(count, device=device)
    torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
    return int(most)
