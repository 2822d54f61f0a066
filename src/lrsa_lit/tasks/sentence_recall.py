"""How many of the sentences that support an answer are kept at a budget of tokens, beside what needs no training."""

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
"""What ranks the same sentences without a model."""


class RecallMeter:
    """Sums over the questions of one process, of the encoder ("") and of each control.

    Args:
        budgets: shares of a context's tokens that may be kept, titles among them.
        rule: how sentences are kept, as :class:`~lrsa_lit.data.filters.SentenceFilter` has it.

    Raises:
        UserError: a budget is no share.
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
            facts: of the question.
            scores: of each sentence, the encoder's.

        Returns:
            A line of JSON: the question's ``id``, ``tokens`` of its context, how many sentences are ``supporting``, and
            how many of these each of ``encoder``, ``bm25`` and ``random`` keeps, by budget.
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
        """From the ``sums`` of all processes: ``recall_10`` …, ``recall`` (their mean) and ``bm25/recall`` …."""
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
        """The encoder's recalls less BM25's of the same questions, whose lines :meth:`update` returned, by budget.

        Recalls are of each question's sentences, so that all questions weigh the same.
        """

        def recalls(name: str, key: str) -> NDArray[np.float64]:
            return np.array([[line[name][key] / line["supporting"] for line in lines]])

        keys = map(label, self.budgets)
        return {key: compare(recalls("encoder", key), recalls("bm25", key)) for key in keys}


def label(budget: float) -> str:
    """A share in percent."""
    return f"{100 * budget:g}"
