"""The scores of :mod:`lrsa_lit.evaluation.metrics`, averaged over a data set and over the processes of a run."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import Metric

from lrsa_lit.evaluation.metrics import Match, exact_match, f1_score, recall


class QAScore(Metric):
    """Mean F1, exact match and recall of generated answers.

    The state is four float64 sums, added up across processes, so the result does not depend on how the questions
    were dealt out.
    """

    higher_is_better = True
    full_state_update = False
    f1: Tensor
    em: Tensor
    recall: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("f1", "em", "recall", "count"):
            self.add_state(name, default=torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, predictions: Sequence[str], answers: Sequence[Sequence[str]], match: Sequence[Match]) -> None:
        """Add generated texts with, for each, its reference answers and how they are matched."""
        for text, references, mode in zip(predictions, answers, match, strict=True):
            self.f1 += f1_score(text, references, mode)
            self.em += exact_match(text, references, mode)
            self.recall += recall(text, references, mode)
            self.count += 1

    def compute(self) -> dict[str, Tensor]:
        """The means ``f1``, ``em`` and ``recall`` in [0, 1] and the ``count`` of questions, scalars of float32."""
        sums = {"f1": self.f1, "em": self.em, "recall": self.recall}
        means = {name: (total / self.count).float() for name, total in sums.items()}
        return {**means, "count": self.count.float()}
