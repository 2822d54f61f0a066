"""Distance of the layers' outputs from those under dense attention (after SSA, arXiv 2511.20102)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lrsa_lit.errors import UserError
from lrsa_lit.objectives.objective import Pass, Term
from lrsa_lit.objectives.teachers import OwnDense

if TYPE_CHECKING:
    from lrsa_lit.data.collate import ExampleSize


class HiddenAlignment(Term):
    """Squared distance of each layer's output from its output with the same weights and dense attention.

    The distance is divided by the squared norm of the dense output, because later layers have larger norms, and
    averaged over layers. SSA aligns the outputs of the attention, in both directions; here the dense outputs get no
    gradient.

    Args:
        of_layers: indices of the layers to compare; null compares all.
        positions: positions per example to compare, drawn at random in each step; null compares all.
        weight: factor of the mean.
    """

    name = "hidden"
    uses_logits = False

    def __init__(
        self, of_layers: Sequence[int] | None = None, positions: int | None = None, weight: float = 1.0
    ) -> None:
        super().__init__(weight)
        if of_layers is not None and (not of_layers or len(set(of_layers)) < len(of_layers) or min(of_layers) < 0):
            raise UserError("of_layers", list(of_layers), "a list of different numbers >= 0, or null")
        if positions is not None and positions < 1:
            raise UserError("positions", positions, "an integer >= 1, or null")
        self.teacher = OwnDense()
        self.of_layers = None if of_layers is None else tuple(of_layers)
        self.positions = positions

    def layers(self, count: int) -> Sequence[int]:
        """The layers to compare; an index beyond ``count`` becomes the last layer (estimates use fewer layers)."""
        return range(count) if self.of_layers is None else sorted({min(layer, count - 1) for layer in self.of_layers})

    def count(self, size: ExampleSize) -> int:
        """All positions that predict a token, or ``positions`` of them."""
        predicting = size.tokens - 1
        return predicting if self.positions is None else min(self.positions, predicting)

    def loss(self, seen: Pass) -> Tensor:
        """The loss summed over positions and averaged over layers."""
        assert self.teacher is not None
        wanted = seen.taught[self.teacher].layers
        where = seen.positions.drawn(self.count, self.name)
        distances = [_distance(seen.layers[layer][where], dense[where]) for layer, dense in wanted.items()]
        return torch.stack(distances).mean()

    def check(self, max_tokens: int, layers: int) -> None:
        """Refuse more positions than examples can have, and layers that the model does not have."""
        if self.of_layers is not None and max(self.of_layers) >= layers:
            raise UserError("of_layers", max(self.of_layers), f"< {layers}, the model's number of layers")
        if self.positions is not None and self.positions >= max_tokens:
            raise UserError("positions", self.positions, f"< {max_tokens}, the max_tokens of the data")


def _distance(output: Tensor, wanted: Tensor) -> Tensor:
    """The relative squared distance, summed over rows (M, D)."""
    dtype = torch.promote_types(output.dtype, torch.float32)
    output, wanted = output.to(dtype), wanted.to(dtype)
    return ((output - wanted).square().sum(dim=1) / wanted.square().sum(dim=1)).sum()
