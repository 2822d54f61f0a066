"""Sampling of the next token of each row, with a temperature, a top_p and a random number per row.

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
        logits: finite numbers, on any device.
        temperatures: the temperature of each row; 0 takes the most likely token.
        top_ps: the top_p of each row, in (0, 1]. The token is drawn from the most likely tokens whose probabilities sum
            up to this share, at least one (nucleus sampling, arXiv 1904.09751).
        uniform: a random number in [0, 1) for each row.
    """
    tokens = logits.argmax(dim=-1)
    if drawn := [row for row, temperature in enumerate(temperatures) if temperature > 0]:

        def of_drawn(values: Sequence[float]) -> Tensor:
            numbers = [values[row] for row in drawn]
            return torch.tensor(numbers, dtype=torch.float64).to(logits.device)[:, None]

        scaled = logits[drawn].double()
        scaled = (scaled - scaled.amax(dim=-1, keepdim=True)) / of_drawn(temperatures)
        # Stable, so that ties are broken the same way on every device.
        chances, order = scaled.softmax(dim=-1).sort(dim=-1, descending=True, stable=True)
        sums = chances.cumsum(dim=-1)
        kept = (sums - chances < of_drawn(top_ps)).sum(dim=-1, keepdim=True)
        wanted = of_drawn(uniform) * sums.gather(1, kept - 1)
        place = torch.searchsorted(sums, wanted, right=True).minimum(kept - 1)
        tokens[drawn] = order.gather(1, place)[:, 0]
    return tokens.tolist()
