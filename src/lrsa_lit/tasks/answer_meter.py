"""What an evaluation under one attention finds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import nn
from torchmetrics import MeanMetric

from lrsa_lit.evaluation.qa_score import QAScore

if TYPE_CHECKING:
    from lrsa_lit.data.collate import Batch


class AnswerMeter(nn.Module):
    """The loss, averaged over answer tokens, and the scores of the answers, all over the processes of a run.

    Attributes:
        groups: the scores of each part of the evaluation, such as a data set of a mixture or a task.
    """

    def __init__(self) -> None:
        super().__init__()
        self.loss = MeanMetric()
        self.score = QAScore()
        self.groups: dict[str, QAScore] = {}

    def reset(self, groups: Sequence[str]) -> None:
        """Start anew, with scores of their own for these parts."""
        self.loss.reset()
        self.score.reset()
        self.groups = {name: QAScore().to(self.score.f1.device) for name in groups}

    def update(self, texts: Sequence[str], batch: Batch) -> None:
        """Add answers, but not to rows that count on another device."""
        for row, text in enumerate(texts):
            if batch["repeated"][row]:
                continue
            for score in [self.score, *(self.groups[name] for name in batch["groups"][row] if name in self.groups)]:
                score.update([text], [batch["answers"][row]], [batch["match"][row]])
