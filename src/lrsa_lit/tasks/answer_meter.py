"""The metrics of an evaluation with one attention."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterable, Sequence
from typing import Any

from lrsa_lit.attention import Usage
from lrsa_lit.data.collate import Batch
from lrsa_lit.evaluation.answers import Answers, means, perplexity, scores


class AnswerMeter:
    """Sums of the losses and scores of one process's answers: over all (""), and per data set of a mixture and task.

    Args:
        generated: whether answers are generated; if not, there are only losses.
    """

    def __init__(self, *, generated: bool = True) -> None:
        self.generated = generated
        self.reset(())

    def reset(self, groups: Iterable[str], texts: Container[str] = ()) -> None:
        """Start again with sums for these groups; groups of plain text (``texts``) also get a perplexity."""
        self._texts = texts
        self.sums: dict[str, Counter[str]] = {name: Counter() for name in ("", *groups)}
        self.usages: list[Usage] = []

    def update(self, answers: Answers, batch: Batch, usage: Usage | None = None) -> None:
        """Add a batch's answers and usage, without rows that are counted on another device."""
        if usage is not None:
            prompts = zip(usage.rows, batch["source_length"], batch["prompt_length"], batch["repeated"], strict=True)
            rows = [row.shortened(source, own) for row, source, own, repeated in prompts if not repeated]
            self.usages.append(usage._replace(rows=rows))
        for row, (loss, tokens) in enumerate(zip(answers.loss, answers.tokens, strict=True)):
            if batch["repeated"][row]:
                continue
            counted: dict[str, Any] = {"loss": loss, "tokens": tokens, "count": 1}
            if answers.text is not None:
                counted |= scores(answers.text[row], batch["answers"][row], batch["match"][row])
            for group in {"", *batch["groups"][row]} & self.sums.keys():
                self.sums[group].update(counted)

    def means(self, of_processes: Sequence[dict[str, Counter[str]]]) -> dict[str, float]:
        """The means over the ``sums`` of all processes, by name: ``loss``, ``f1`` …, and ``needle/f1`` … for groups."""
        found: dict[str, float] = {}
        for group in self.sums:
            values = means([sums[group] for sums in of_processes], generated=self.generated)
            if group in self._texts:
                values["perplexity"] = perplexity(values["loss"])
            found |= {f"{group}/{name}" if group else name: value for name, value in values.items()}
        return found
