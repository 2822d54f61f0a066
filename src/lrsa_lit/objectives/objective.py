"""What an objective is, and what it sees of a training step.

Dimensions: B rows, T tokens of each (padding included), M positions with a loss, D width, V vocabulary.
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

    Where devices share rows, it has this one's tokens alone: a sum over its positions is a part of the whole sum.

    Attributes:
        targets: (B T,) int64, the token that each position predicts; the last one of a sequence predicts none.
        positions: which of them an objective looks at.
        hidden: (B T, D), what goes into the output head.
        head: makes logits of it.
        layers: the output (B T, D) of each decoder layer that an objective asks for, by its number.
        taught: what each teacher made of the same tokens.
    """

    targets: Tensor
    positions: Positions
    hidden: Tensor
    head: Head
    layers: dict[int, Tensor] = field(default_factory=dict)
    taught: dict[Teacher, TeacherPass] = field(default_factory=dict)


class Objective(ABC):
    """What training minimises: the weighted sum of its terms' means."""

    @property
    @abstractmethod
    def terms(self) -> Sequence[Term]:
        """What it consists of."""

    def check(self, max_tokens: int, layers: int) -> None:  # noqa: B027 - most ask for nothing
        """Raise a UserError if it asks for more than examples of ``max_tokens`` tokens or so many layers have."""


class Term(Objective):
    """A loss over some positions of each example, of which the mean over an optimizer step counts.

    Every position weighs the same, however a step's examples are spread over batches and devices. So a subclass says
    how many positions an example has, and sums the loss over those of a batch.

    Args:
        weight: what the mean is multiplied with.

    Attributes:
        name: of the loss in logs: train/loss/NAME.
        uses_logits: whether its positions get logits; else it looks at hidden states alone.
        needs_rejected: whether it compares an example's answer with one that the example rejects.
        teacher: whose pass over the same tokens it needs, or None.
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
        """Itself."""
        return (self,)

    @abstractmethod
    def count(self, size: ExampleSize) -> int:
        """How many losses of an example the mean is over: one at each position, if nothing else is said."""

    def logits(self, size: ExampleSize) -> int:
        """How many positions of an example the losses take: more than there are losses where one is of several."""
        return self.count(size)

    @abstractmethod
    def loss(self, seen: Pass) -> Tensor:
        """The loss summed over the positions of a batch: at least float32, no dimensions."""

    def layers(self, count: int) -> Sequence[int]:
        """Which of the model's ``count`` decoder layers it needs the outputs of."""
        return ()
