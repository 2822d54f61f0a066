"""RULER's question answering: a question's passages as numbered documents, mixed with documents of other questions.

Source: RULER's ``qa_1`` (SQuAD) and ``qa_2`` (HotpotQA). The documents that hold the answer are at random positions
among others. Other documents of the question's own article or context are added before any from elsewhere. Splits are
those of :class:`~lrsa_lit.data.squad.SquadArticles` and :class:`~lrsa_lit.data.hotpotqa.HotpotQA` with the same seed
and fractions.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

from lrsa_lit.data.haystack import ParagraphPool
from lrsa_lit.data.hotpotqa import HotpotQA
from lrsa_lit.data.module import SPLITS, Split
from lrsa_lit.data.prompts import Example, Prompt, TooLong
from lrsa_lit.data.records import Passage, QARecord
from lrsa_lit.data.squad import SquadArticles, article_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ASK = "Answer the question based on the given documents. Only give me the answer and do not output any other words."
PROMPT = Prompt(
    f"{_ASK}\n\nThe following are given documents.\n\n{{context}}\n\n{_ASK}\n\nQuestion: {{input}}",
    answer="Answer:",
    heading="Document {number}:",
)


class Documents:
    """A data set's questions, each with its own documents, and a pool of all documents as distractors.

    Args:
        questions: the questions of each split; they are shuffled in place by ``seed``. Titles identify documents.
        documents: the documents of all splits. If several have the same title, the last one is used.
        seed: the data set's seed.
        subject_of: returns the name of a question's subject, where several questions share one; None if none do.
    """

    def __init__(
        self,
        questions: dict[Split, list[QARecord]],
        documents: Iterable[Passage],
        seed: int,
        subject_of: Callable[[QARecord], str] | None = None,
    ) -> None:
        self.questions = questions
        for split, records in questions.items():
            random.Random(f"{seed}:{split}").shuffle(records)
        by_title = {passage.title: passage for passage in documents}
        self._positions = {title: position for position, title in enumerate(by_title)}
        self._subject_of = subject_of
        self._pool = ParagraphPool(list(by_title.values()), PROMPT)

    def fill(
        self, record: QARecord, rng: random.Random, tokenizer: PreTrainedTokenizerBase, max_tokens: int
    ) -> tuple[QARecord, Example | TooLong]:
        """A question with its supporting documents among as many others as fit.

        Returns:
            The filled record, and its example or, if even the supporting documents do not fit, :class:`TooLong`.
        """
        gold = [passage for passage in record.passages if passage.title in record.supporting_titles]
        others = [passage.title for passage in record.passages if passage.title not in record.supporting_titles]
        own = {self._positions[passage.title] for passage in record.passages}
        full, example = self._pool.fill(
            replace(record, passages=tuple(rng.sample(gold, len(gold)))),
            lambda position: position not in own,
            rng,
            tokenizer,
            max_tokens,
            first=[self._positions[title] for title in rng.sample(others, len(others))],
        )
        if self._subject_of is not None and not isinstance(example, TooLong):
            example["subject"] = self._subject_of(record)
        return full, example


def squad(seed: int, val_fraction: float, test_fraction: float) -> Documents:
    """SQuAD 2.0's answerable questions; documents are untitled paragraphs, and subjects are articles."""
    data = SquadArticles(seed=seed, val_fraction=val_fraction, test_fraction=test_fraction)
    articles = {split: data.articles(split) for split in SPLITS}
    documents = (passage for split in SPLITS for article in articles[split] for passage in article[0].passages)
    questions = {split: [record for article in articles[split] for record in article] for split in SPLITS}
    return Documents(questions, documents, seed, article_of)


def hotpotqa(seed: int, val_fraction: float, test_fraction: float) -> Documents:
    """HotpotQA's questions, each with its ten paragraphs; a document is a title and a paragraph."""
    data = HotpotQA(seed=seed, val_fraction=val_fraction, test_fraction=test_fraction)
    contexts = {
        question["_id"]: tuple(Passage(title, f"{title}\n{''.join(text)}") for title, text in question["context"])
        for question in data.raw
    }
    questions = {
        split: [replace(record, passages=contexts[record.id]) for record in data.records(split)] for split in SPLITS
    }
    return Documents(questions, (passage for context in contexts.values() for passage in context), seed)


QA_TASKS: dict[str, Callable[[int, float, float], Documents]] = {"qa_squad": squad, "qa_hotpotqa": hotpotqa}
