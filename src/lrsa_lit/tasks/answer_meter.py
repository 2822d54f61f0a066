"""What an evaluation under one attention finds."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from lrsa_lit.evaluation.answers import Answers, QAScore, scores

if TYPE_CHECKING:
    from lrsa_lit.data.collate import Batch


class AnswerMeter:
    """Losses and scores of the answers of one process: of all, and of each part of the evaluation.

    A part is a data set of a mixture or a task.

    Args:
        generated: whether there are generated answers; else there are losses alone.
    """

    def __init__(self, *, generated: bool = True) -> None:
        self.generated = generated
        self.reset(())

    def reset(self, groups: Iterable[str]) -> None:
        """Start anew, with scores for these parts."""
        self.scores = {name: QAScore() for name in ("", *groups)}

    def update(self, answers: Answers, batch: Batch) -> None:
        """Add the answers to a batch, except those of rows that count on another device."""
        for row, (loss, tokens) in enumerate(zip(answers.loss, answers.tokens, strict=True)):
            if batch["repeated"][row]:
                continue
            found = (
                {} if answers.text is None else scores(answers.text[row], batch["answers"][row], batch["match"][row])
            )
            for name in ("", *batch["groups"][row]):
                if name in self.scores:
                    self.scores[name].update(loss, tokens, found)

    def means(self, of_processes: Sequence[dict[str, QAScore]]) -> dict[str, float]:
        """The means over the ``scores`` of all processes by name: ``loss``, ``f1`` …, and of a part ``needle/f1`` …."""
        parts = defaultdict(list)
        for scores_of_process in of_processes:
            for group, score in scores_of_process.items():
                parts[group].append(score)
        return {
            f"{group}/{name}" if group else name: value
            for group, found in parts.items()
            for name, value in QAScore.total(found).means(generated=self.generated).items()
        }
