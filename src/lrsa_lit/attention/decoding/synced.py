"""Numbers that processes must agree on where a call of the model takes all of them, as sharded weights do."""

from __future__ import annotations

import torch


def most_of_all(count: int, device: torch.device) -> int:
    """The highest of the counts of all processes, each of which calls this with its own and its device."""
    most = torch.tensor(count, device=device)
    torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
    return int(most)
