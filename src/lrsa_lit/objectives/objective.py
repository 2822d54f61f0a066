"""The base classes of objectives, and what objectives see of a training step.

Dimensions: B rows, T tokens per row (including padding), M positions with a loss, D width, V vocabulary.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from lrsa_lit.errors import UserError

if TYPE_CHECKING:
    from lrsa_lit.data.collate import ExampleSize
    from lrsa_lit.models.head import Head
    from lrsa_lit.objectives.positions import Positions
    from lrsa_lit.objectives.teachers import Teacher, TeacherPass


@dataclass
class Pass:
    """A forward pass of the trained model, as its objectives see it.

    If several devices share the rows, it covers only this device's tokens, and a sum over its positions is only a part
    of the whole sum.

    Attributes:
        targets: (B T,) int64, the token that each position predicts. The last position of a sequence predicts none.
        positions: the positions that objectives can choose from.
        hidden: (B T, D), the inputs of the output head.
        head: the output head, which makes logits from ``hidden``.
        layers: the output (B T, D) of each decoder layer that an objective needs, by layer index.
        taught: the pass of each teacher over the same tokens.
    """

    targets: Tensor
    positions: Positions
    hidden: Tensor
    head: Head
    layers: dict[int, Tensor] = field(default_factory=dict)
    taught: dict[Teacher, TeacherPass] = field(default_factory=dict)


class Objective(ABC):
    """A training objective: the weighted sum of its terms' means."""

    @property
    @abstractmethod
    def terms(self) -> Sequence[Term]:
        """The terms of the sum."""

    def check(self, max_tokens: int, layers: int) -> None:  # noqa: B027 - most need no check
        """Raise a UserError if it needs more than ``max_tokens`` tokens per example or ``layers`` layers."""


class Term(Objective):
    """A loss over some positions of each example, averaged over all positions of an optimizer step.

    Every position has the same weight, however a step's examples are spread over batches and devices. So a subclass
    states how many positions an example has, and sums the loss over the positions of a batch.

    Args:
        weight: factor of the mean.

    Attributes:
        name: name of the loss in logs: train/loss/NAME.
        uses_logits: whether it needs logits at its positions, or only hidden states.
        needs_rejected: whether it compares an example's answer with a rejected one.
        teacher: the teacher whose pass over the same tokens it needs, or None.
    """

    name: ClassVar[str]
    uses_logits: ClassVar[bool] = True
    needs_rejected: ClassVar[bool] = False
    teacher: Teacher | None = None

    def __init__(self, weight: float = 1.0) -> None:
        if not (weight >= 0.0 and math.isfinite(weight)):
            raise UserError("weight", weight, "a number >= 0")
        self.weight = weight

    @property
    def terms(self) -> Sequence[Term]:
        """Only this term."""
        return (self,)

    @abstractmethod
    def count(self, size: ExampleSize) -> int:
        """How many losses an example adds to the mean; one per position unless the term documents otherwise."""

    def logits(self, size: ExampleSize) -> int:
        """How many positions of an example need logits. Override it if one loss covers several positions."""
        return self.count(size)

    @abstractmethod
    def loss(self, seen: Pass) -> Tensor:
        """The loss summed over the positions of a batch: a scalar, at least float32."""

    def layers(self, count: int) -> Sequence[int]:
        """The indices of the decoder layers, out of ``count``, whose outputs it needs."""
        return ()
