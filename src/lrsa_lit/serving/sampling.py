"""The next token of each row, drawn with the row's own temperature, share and number.

Dimensions: R rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def next_tokens(
    logits: Tensor, temperatures: Sequence[float], top_ps: Sequence[float], uniform: Sequence[float]
) -> list[int]:
    """One token for each row of the logits (R, V).

    Args:
        logits: finite, on any device.
        temperatures: of each row; 0 takes the likeliest token.
        top_ps: of each row, in (0, 1]: the likeliest tokens whose probabilities reach this share, one at least, are
            drawn from (arXiv 1904.09751).
        uniform: a number of each row, drawn from [0, 1).
    """
    tokens = logits.argmax(dim=-1)
    if drawn := [row for row, temperature in enumerate(temperatures) if temperature > 0]:

        def of_drawn(values: Sequence[float]) -> Tensor:
            numbers = [values[row] for row in drawn]
            return torch.tensor(numbers, dtype=torch.float64).to(logits.device)[:, None]

        scaled = logits[drawn].double()
        scaled = (scaled - scaled.amax(dim=-1, keepdim=True)) / of_drawn(temperatures)
        # Stable, so that ties fall the same way on each device.
        chances, order = scaled.softmax(dim=-1).sort(dim=-1, descending=True, stable=True)
        sums = chances.cumsum(dim=-1)
        kept = (sums - chances < of_drawn(top_ps)).sum(dim=-1, keepdim=True)
        wanted = of_drawn(uniform) * sums.gather(1, kept - 1)
        place = torch.searchsorted(sums, wanted, right=True).minimum(kept - 1)
        tokens[drawn] = order.gather(1, place)[:, 0]
    return tokens.tolist()
