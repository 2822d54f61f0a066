"""RULER's question answering: a question's passages as numbered documents among documents of other questions.

Source: RULER's ``qa_1`` (SQuAD) and ``qa_2`` (HotpotQA). The documents that hold the answer lie at random places among
others, of which those of the question's own article or context are taken first. Splits are those of
:class:`~lrsa_lit.data.squad.SquadArticles` and :class:`~lrsa_lit.data.hotpotqa.HotpotQA` with the same seed and shares.
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
    """The questions of a data set, each with its own documents, and all documents to put them among.

    Args:
        questions: of each split, shuffled here by the seed; titles tell documents apart.
        documents: of all splits; of several with one title, the last is taken.
        seed: of the data set.
        subject_of: names what a question is about, where texts of different questions share it; None for nothing.
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
        """A question with its supporting documents among as many others as fit; :class:`TooLong` if they do not."""
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
    """SQuAD 2.0's answerable questions; the documents are paragraphs, without a title, the subjects articles."""
    data = SquadArticles(seed=seed, val_fraction=val_fraction, test_fraction=test_fraction)
    articles = {split: data.articles(split) for split in SPLITS}
    documents = (passage for split in SPLITS for article in articles[split] for passage in article[0].passages)
    questions = {split: [record for article in articles[split] for record in article] for split in SPLITS}
    return Documents(questions, documents, seed, article_of)


def hotpotqa(seed: int, val_fraction: float, test_fraction: float) -> Documents:
    """HotpotQA's questions with the ten paragraphs of each; a document is a title and a paragraph."""
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
