"""What an evaluation under one attention finds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import nn
from torchmetrics import MeanMetric

from lrsa_lit.qa_score import QAScore

if TYPE_CHECKING:
    from lrsa_lit.data.collate import Batch


class AnswerMeter(nn.Module):
    """The loss, averaged over answer tokens, and the scores of the answers, all over the processes of a run.

    Attributes:
        sources: the scores of each data set of a mixture.
    """

    def __init__(self) -> None:
        super().__init__()
        self.loss = MeanMetric()
        self.score = QAScore()
        self.sources: dict[str, QAScore] = {}

    def reset(self, sources: Sequence[str]) -> None:
        """Start anew, with scores of their own for these data sets if they are several."""
        self.loss.reset()
        self.score.reset()
        self.sources = {name: QAScore().to(self.score.f1.device) for name in sources if len(sources) > 1}

    def update(self, texts: Sequence[str], batch: Batch) -> None:
        """Add answers, but not to rows that count on another device."""
        for row, text in enumerate(texts):
            if batch["repeated"][row]:
                continue
            scores = (self.score, self.sources.get(batch["source"][row]))
            for score in [score for score in scores if score is not None]:
                score.update([text], [batch["answers"][row]], [batch["match"][row]])
