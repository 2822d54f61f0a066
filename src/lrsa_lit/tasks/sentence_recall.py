"""Recall of supporting sentences at a token budget, compared with baselines that need no training."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lrsa_lit.bounds import is_weight
from lrsa_lit.data.filters.sentence_filter import SelectionRule, ranked, selected
from lrsa_lit.data.sentence_facts import Facts
from lrsa_lit.errors import UserError
from lrsa_lit.evaluation.statistics import Comparison, compare

CONTROLS = ("bm25", "random")
"""Baselines that rank the same sentences without a model."""


class RecallMeter:
    """Sums over the questions of one process, for the encoder ("") and for each baseline.

    Args:
        budgets: shares of a context's tokens that may be kept, including titles.
        rule: how sentences are kept, as in :class:`~lrsa_lit.data.filters.SentenceFilter`.

    Raises:
        UserError: a budget is not a share.
    """

    def __init__(self, budgets: Sequence[float], rule: SelectionRule) -> None:
        for number, budget in enumerate(budgets):
            if not is_weight(budget) or not 0 < budget <= 1:
                raise UserError(f"budgets.{number}", budget, "a number above 0 and at most 1")
        if not budgets:
            raise UserError("budgets", list(budgets), "a list of at least one share")
        self.budgets, self.rule = budgets, rule
        self.sums: Counter[str] = Counter()

    def update(self, facts: Facts, scores: Sequence[float]) -> dict[str, Any]:
        """Count a question.

        Args:
            facts: the question and its sentences.
            scores: the encoder's score of each sentence.

        Returns:
            A dict for a JSON line: the question's ``id``, the ``tokens`` of its context, the number of ``supporting``
            sentences, and how many of these ``encoder``, ``bm25`` and ``random`` keep, by budget.
        """
        rng = random.Random(facts.id)
        of_name = {"": scores, "bm25": facts.bm25, "random": [rng.random() for _ in scores]}
        tokens = sum(facts.lengths) + sum(facts.titles[place] for place in set(facts.paragraphs))
        line: dict[str, Any] = {"id": facts.id, "tokens": tokens, "supporting": len(facts.supporting)}
        self.sums.update({"questions": 1, "supporting": len(facts.supporting)})
        for name, each in of_name.items():
            found = {label(budget): self._kept(facts, each, int(budget * tokens)) for budget in self.budgets}
            self.sums.update({f"{name}/{key}": kept for key, kept in found.items()})
            line[name or "encoder"] = found
        return line

    def _kept(self, facts: Facts, scores: Sequence[float], budget: int) -> int:
        order = ranked(scores, [False] * len(scores))
        kept = selected(order, facts.lengths, budget, self.rule, facts.paragraphs, facts.titles)
        return len({*kept} & {*facts.supporting})

    def recalls(self, of_processes: Sequence[Mapping[str, int]]) -> dict[str, float]:
        """Recalls over the ``sums`` of all processes: ``recall_10`` …, their mean ``recall``, ``bm25/recall`` …."""
        sums: Counter[str] = Counter()
        for each in of_processes:
            sums.update(each)
        found: dict[str, float] = {"count": sums["questions"]}
        for name in ("", *CONTROLS):
            stem = f"{name}/" if name else ""
            shares = {label(each): sums[f"{name}/{label(each)}"] / sums["supporting"] for each in self.budgets}
            found |= {f"{stem}recall_{key}": share for key, share in shares.items()}
            found[f"{stem}recall"] = sum(shares.values()) / len(shares)
        return found

    def over_bm25(self, lines: Sequence[Mapping[str, Any]]) -> dict[str, Comparison]:
        """The difference of the encoder's and BM25's recalls on the same questions, by budget.

        ``lines`` are those that :meth:`update` returned. Recalls are computed per question, so all questions have the
        same weight.
        """

        def recalls(name: str, key: str) -> NDArray[np.float64]:
            return np.array([[line[name][key] / line["supporting"] for line in lines]])

        keys = map(label, self.budgets)
        return {key: compare(recalls("encoder", key), recalls("bm25", key)) for key in keys}


def label(budget: float) -> str:
    """A share as a percentage, for names."""
    return f"{100 * budget:g}"
