"""The base class of parts that a run can train instead of the model's weights."""

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
    """A part of the task that is trained while all weights are frozen."""

    def check(self, max_tokens: int, steps: int) -> None:  # noqa: B027 - most need no check
        """Raise a UserError if a fit of this length or with these examples cannot train it.

        Args:
            max_tokens: tokens of the longest example.
            steps: optimizer steps of the fit; -1 if the number of epochs ends it.
        """

    @abstractmethod
    def install(self, model: Any) -> None:
        """Freeze a loaded model and insert the trained part."""

    def groups(self, parameters: list[Any]) -> list[Any]:
        """The optimizer's first argument: the trained parameters, or PyTorch's parameter groups."""
        return parameters

    def prepare(self, optimizer: Optimizer) -> None:  # noqa: B027 - most do not change it
        """Change a new optimizer, before its schedule is created."""

    @abstractmethod
    def penalised(
        self, loss: Tensor, mean: Tensor, batch: TrainBatch, step: int, steps: int
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Add a penalty to the objective.

        Args:
            loss: the batch's part of the step's loss.
            mean: the mean of the objective over the batch.
            batch: the batch.
            step: the optimizer step, from 0.
            steps: optimizer steps of the fit.

        Returns:
            Both with the penalty added (the loss with the batch's share of it), and further values to log.
        """

    @abstractmethod
    def served(self, rule: LRSAConfig) -> LRSAConfig:
        """The attention for the next evaluation, given the one of the last evaluation."""

    def released(self) -> None:  # noqa: B027 - most need not do anything
        """Called after an evaluation, before training continues."""


def share_of_step(batch: TrainBatch) -> float:
    """The batch's share of the examples in its optimizer step; the shares of all batches and devices sum to 1."""
    return len(batch["sizes"]) / len(batch["step_sizes"])


def check_alone(field: str, why: dict[str, Any], because: str) -> None:
    """Refuse settings that are not allowed together with a trained part.

    Args:
        field: the part's name among the task's settings.
        why: values by the name of their setting; none of them may be true.
        because: the reason for the error message.

    Raises:
        UserError: one of the values is true.
    """
    for name, value in why.items():
        if value:
            raise UserError(name, reason=f"is not allowed with {field}: {because}")
