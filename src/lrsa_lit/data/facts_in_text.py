"""Facts of a small world hidden in long text: BABILong-like, with bAbI's simulator re-implemented from its paper.

Sources: Weston et al., "Towards AI-Complete Question Answering: A Set of Prerequisite Toy Tasks", arXiv 1502.05698
(the tasks); Kuratov et al., "BABILong: Testing the Limits of LLMs with Long Context Reasoning-in-a-Haystack", arXiv
2406.10149 (facts scattered in order through a text that has nothing to do with them, and the parts of the prompt).
Neither project's data, text or code is here: worlds, wording and solved examples are ours, and the background is
HotpotQA's paragraphs, in one running text, where BABILong has books; facts lie between paragraphs, not within them. So
scores do not compare with published ones.
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
    """bAbI's tasks in text of any length, any number of examples; the tasks take turns, each with a score of its own.

    The score is exact match: every answer is one word, which the prompt asks for. (BABILong asks for a sentence in its
    first three tasks, and looks for the word in it; ``recall`` does the latter.) Background paragraphs may mention the
    same names and places, as BABILong's books do. The fourth task has few different questions, so the same one can come
    in two splits, in another text.

    Args:
        tasks: any of qa1 (a supporting fact), qa2 and qa3 (two and three of them), qa4 and qa5 (relations of two and
            three arguments), qa6 (yes or no) and qa7 (counting).
        kwargs: train, val, test (numbers of examples), source, sha256 (of the background), and see QADataModule.
    """

    known: ClassVar[tuple[str, ...]] = tuple(FACT_TASKS)
    score = "em"

    def __init__(self, tasks: Sequence[str] = tuple(FACT_TASKS), **kwargs: Any) -> None:
        super().__init__(tasks=tasks, **kwargs)

    def make(self, split: Split, task: str, number: int) -> QARecord:
        """The facts of a world in their order, each with the blank behind it; no prompt shows their titles."""
        name = f"{split}-{task}-{number}"
        return FACT_TASKS[task].make(name, random.Random(f"{self.seed}:{name}"))

    def to_example(self, record: QARecord) -> Example | TooLong:
        """The facts, in their order, at random depths of the background; decided by ``seed`` and the id."""
        rng = random.Random(f"{self.seed}:{record.id}:haystack")
        pool = self._text.under(FACT_TASKS[record.task].prompt)
        full, whole = pool.fill(record, lambda _: True, rng, self.checked_tokenizer, self.max_tokens)
        return self.encode(full, whole, pool.prompt)

    @cached_property
    def _text(self) -> ParagraphPool:
        pieces = [Passage("", f"{paragraph.text} ") for paragraph in self._pool.passages]
        return ParagraphPool(pieces, next(iter(FACT_TASKS.values())).prompt)
