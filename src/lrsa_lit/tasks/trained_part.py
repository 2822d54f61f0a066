"""What a run may train in the place of a model's weights."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

from lrsa_lit.attention import LRSAConfig
from lrsa_lit.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim import Optimizer

    from lrsa_lit.data.collate import TrainBatch


class TrainedPart(ABC):
    """A part of the task that is trained while all weights stay as they are."""

    def check(self, max_tokens: int, steps: int) -> None:  # noqa: B027 - most ask for nothing
        """Raise a UserError if a fit says nothing about it.

        Args:
            max_tokens: of the longest example.
            steps: of the optimizer; -1 where epochs end the fit.
        """

    @abstractmethod
    def install(self, model: Any) -> None:
        """Freeze a model that is loaded, and put what is trained into it."""

    def groups(self, parameters: list[Any]) -> list[Any]:
        """What the optimizer is made from: the trained parameters, or groups of them as PyTorch has them."""
        return parameters

    def prepare(self, optimizer: Optimizer) -> None:  # noqa: B027 - most leave it as it is
        """Change an optimizer that was just made, before its schedule is."""

    @abstractmethod
    def penalised(
        self, loss: Tensor, mean: Tensor, batch: TrainBatch, step: int, steps: int
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Add to the objective what all examples of a step share.

        Args:
            loss: the batch's part in that of a step.
            mean: of the objective over the batch.
            batch: that it is of.
            step: of the optimizer, from 0.
            steps: of the fit.

        Returns:
            The part and the mean with it, and what else is logged.
        """

    @abstractmethod
    def served(self, rule: LRSAConfig) -> LRSAConfig:
        """The attention to evaluate with from now on, given that of the last evaluation."""

    def released(self) -> None:  # noqa: B027 - most change nothing
        """Let training go on behind an evaluation."""


def share_of_step(batch: TrainBatch) -> float:
    """The batch's share of the examples of its optimizer step; those of all batches and devices sum to 1."""
    return len(batch["sizes"]) / len(batch["step_sizes"])


def check_alone(field: str, why: dict[str, Any], because: str) -> None:
    """Refuse other settings that would train or change something as well.

    Args:
        field: the part's, as the task calls it.
        why: by name of a setting, what is given there; nothing of it may be true.
        because: what is said of the first that is.

    Raises:
        UserError: one is given.
    """
    for name, value in why.items():
        if value:
            raise UserError(name, reason=f"is not allowed beside {field}: {because}")
