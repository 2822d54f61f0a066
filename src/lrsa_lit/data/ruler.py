"""RULER's recipe at any length: retrieval, tracing, aggregation and question answering, generated from a seed.

Source: Hsieh et al., "RULER: What's the Real Context Size of Your Long-Context Language Models?", COLM 2024. The score
is the share of the references that an answer contains, ignoring case (``recall``).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

from lrsa_lit.data import fingerprint, squad
from lrsa_lit.data.module import Split
from lrsa_lit.data.needle import Needles
from lrsa_lit.data.needle_tasks import TASKS
from lrsa_lit.data.prompts import Example, TooLong
from lrsa_lit.data.qa_tasks import PROMPT as DOCUMENTS
from lrsa_lit.data.qa_tasks import QA_TASKS, Documents
from lrsa_lit.data.records import QARecord
from lrsa_lit.data.sized import SizedTask, largest
from lrsa_lit.data.splits import check_fractions
from lrsa_lit.data.word_tasks import WORD_TASKS, WORDS
from lrsa_lit.errors import UserError

RULER_TASKS = (*TASKS, *WORD_TASKS, *QA_TASKS)


class Ruler(Needles):
    """RULER's kinds of tasks, filled up to ``max_tokens``; examples alternate between separately scored tasks.

    Args:
        tasks: any of niah_single, niah_multikey, niah_multivalue, niah_multiquery, variable_tracking, common_words,
            frequent_words, qa_squad, qa_hotpotqa.
        val_fraction: share of qa_squad's articles and of qa_hotpotqa's questions in the validation split.
        test_fraction: share of them in the test split.
        kwargs: train, val and test (numbers of examples); source and sha256 (of the haystack of the niah tasks and of
            variable_tracking); further arguments of QADataModule.
    """

    known: ClassVar[tuple[str, ...]] = RULER_TASKS
    qa_tasks: ClassVar[Mapping[str, Callable[[int, float, float], Documents]]] = QA_TASKS

    def __init__(
        self,
        tasks: Sequence[str] = RULER_TASKS,
        val_fraction: float = 0.1,
        test_fraction: float = 0.1,
        **kwargs: Any,
    ) -> None:
        super().__init__(tasks=tasks, **kwargs)
        check_fractions(val_fraction, test_fraction)
        self.val_fraction, self.test_fraction = val_fraction, test_fraction
        self._documents: dict[str, Documents] = {}

    def sources(self) -> dict[str, str]:
        """The digests of the haystack, of SQuAD and of the word lists."""
        return super().sources() | fingerprint.of_files([squad.SOURCE, *WORDS])

    @property
    def sized_tasks(self) -> Mapping[str, SizedTask]:
        """The tasks whose contexts are generated at the size that fits the budget."""
        return WORD_TASKS

    def make(self, split: Split, task: str, number: int) -> QARecord:
        """The record of a task; for a task that grows with the budget, at its smallest size."""
        if task in self.sized_tasks:
            return self._of_size(task, f"{split}-{task}-{number}", self.sized_tasks[task].smallest)
        if task in self.qa_tasks:
            return self._question(split, task, number)
        return super().make(split, task, number)

    def to_example(self, record: QARecord) -> Example | TooLong:
        """Fill the budget by growing the record or adding other texts; ``seed`` and the id decide how."""
        if record.task in self.sized_tasks:
            _, smallest, prompt = self.sized_tasks[record.task]
            grown = partial(self._of_size, record.task, record.id)
            return self.encode(*largest(grown, smallest, prompt, self.checked_tokenizer, self.max_tokens), prompt)
        if record.task in self.qa_tasks:
            rng = random.Random(f"{self.seed}:{record.id}")
            among = self._of(record.task).fill(record, rng, self.checked_tokenizer, self.max_tokens)
            return self.encode(*among, DOCUMENTS)
        return super().to_example(record)

    def _of_size(self, task: str, name: str, size: int) -> QARecord:
        rng = random.Random(f"{self.seed}:{name}")
        return replace(self.sized_tasks[task].make(name, rng, size, self.max_tokens), task=task)

    def _question(self, split: Split, task: str, number: int) -> QARecord:
        questions = self._of(task).questions[split]
        turn = number // len(self.tasks)
        if turn >= len(questions):
            most = f"{len(questions) * len(self.tasks)} or less, as there are {len(questions)} questions of {task}"
            raise UserError(split, getattr(self, split), most)
        return replace(questions[turn], id=f"{split}-{task}-{questions[turn].id}")

    def _of(self, task: str) -> Documents:
        if task not in self._documents:
            self._documents[task] = self.qa_tasks[task](self.seed, self.val_fraction, self.test_fraction)
        return self._documents[task]
