"""Facts of a simulated world hidden in long text: like BABILong, with bAbI's simulator re-implemented from its paper.

Sources: Weston et al., "Towards AI-Complete Question Answering: A Set of Prerequisite Toy Tasks", arXiv 1502.05698 (the
tasks); Kuratov et al., "BABILong: Testing the Limits of LLMs with Long Context Reasoning-in-a-Haystack", arXiv
2406.10149 (facts scattered in order through an unrelated text, and the parts of the prompt). No data, text or code of
either project is used. Worlds, wording and solved examples are this project's own. The background is HotpotQA's
paragraphs joined into one text, where BABILong uses books, and facts are placed between paragraphs, not inside them.
Scores are therefore not comparable with published ones.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import cached_property
from typing import Any, ClassVar

from lrsa_lit.data.fact_tasks import FACT_TASKS
from lrsa_lit.data.haystack import ParagraphPool
from lrsa_lit.data.module import Split
from lrsa_lit.data.needle import Needles
from lrsa_lit.data.prompts import Example, TooLong
from lrsa_lit.data.records import Passage, QARecord


class FactsInText(Needles):
    """bAbI's tasks in text of any length; examples alternate between the tasks, which are scored separately.

    The score is exact match: every answer is one word, as the prompt demands. (In its first three tasks, BABILong asks
    for a sentence and searches it for the word, as ``recall`` does.) Background paragraphs may mention the same names
    and places, as BABILong's books do. Task qa4 has few different questions, so the same question may occur in two
    splits, in different texts.

    Args:
        tasks: any of qa1 (a supporting fact), qa2 and qa3 (two and three of them), qa4 and qa5 (relations of two and
            three arguments), qa6 (yes or no) and qa7 (counting).
        kwargs: train, val and test (numbers of examples); source and sha256 (of the background); further arguments of
            QADataModule.
    """

    known: ClassVar[tuple[str, ...]] = tuple(FACT_TASKS)
    score = "em"

    def __init__(self, tasks: Sequence[str] = tuple(FACT_TASKS), **kwargs: Any) -> None:
        super().__init__(tasks=tasks, **kwargs)

    def make(self, split: Split, task: str, number: int) -> QARecord:
        """The facts of a world in order, each followed by a space; prompts do not show their titles."""
        name = f"{split}-{task}-{number}"
        return FACT_TASKS[task].make(name, random.Random(f"{self.seed}:{name}"))

    def to_example(self, record: QARecord) -> Example | TooLong:
        """The example with the facts, in order, at random depths of the background; ``seed`` and the id decide them."""
        rng = random.Random(f"{self.seed}:{record.id}:haystack")
        pool = self._text.under(FACT_TASKS[record.task].prompt)
        full, whole = pool.fill(record, lambda _: True, rng, self.checked_tokenizer, self.max_tokens)
        return self.encode(full, whole, pool.prompt)

    @cached_property
    def _text(self) -> ParagraphPool:
        pieces = [Passage("", f"{paragraph.text} ") for paragraph in self._pool.passages]
        return ParagraphPool(pieces, next(iter(FACT_TASKS.values())).prompt)
