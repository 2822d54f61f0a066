"""The canonical record: a question, the passages it is asked about and its answers; read from JSONL and Parquet."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol, get_args

from lrsa_lit.data.reading import Row, blamed_on, check_row, check_text, kind_of, read_rows
from lrsa_lit.errors import UserError
from lrsa_lit.evaluation.answer_scores import Match

_PASSAGE = {"title": str, "text": str}
_TURN = {"question": str, "answer": str}
_REQUIRED = {"id": str, "passages": [_PASSAGE], "question": str, "answers": [str]}
_OPTIONAL = {
    "supporting_titles": [str],
    "supporting_sentences": [_PASSAGE],
    "match": str,
    "task": str,
    "turns": [_TURN],
}


@dataclass(frozen=True)
class Passage:
    """A piece of the context. An empty title is not shown in the prompt."""

    title: str
    text: str


@dataclass(frozen=True)
class Turn:
    """An earlier question about the same context, with its reference answer (not a model's answer)."""

    question: str
    answer: str


class Record(Protocol):
    """What a data set yields: one record per example."""

    @property
    def id(self) -> str:
        """Unique within a split."""

    @property
    def task(self) -> str:
        """The kind of question, if the data set has several kinds; otherwise ""."""

    def check_texts(self) -> None:
        """Raise a UserError for text that no tokenizer accepts."""


@dataclass(frozen=True)
class QARecord:
    """One question about a context; :meth:`from_dict` reads what ``dataclasses.asdict`` returns.

    Attributes:
        id: unique within a data set.
        passages: the context, in order.
        question: the question.
        answers: the reference answers, at least one.
        supporting_titles: titles of the passages that hold the answer; may be empty.
        match: ``"any"``: the answers are alternatives; ``"all"``: every answer is required; ``"verbatim"``: the only
            answer is a text to repeat, preceded by a required first word.
        task: the kind of question, if the data set has several kinds; each kind is scored separately.
        turns: earlier questions with their answers, in order; the context comes with the first question.
        supporting_sentences: sentences that the answer follows from, each with the title of its passage; may be empty.
    """

    id: str
    passages: tuple[Passage, ...]
    question: str
    answers: tuple[str, ...]
    supporting_titles: tuple[str, ...] = ()
    match: Match = "any"
    task: str = ""
    turns: tuple[Turn, ...] = ()
    supporting_sentences: tuple[Passage, ...] = ()

    @property
    def questions(self) -> tuple[str, ...]:
        """The questions of the earlier turns, then the record's own."""
        return (*(turn.question for turn in self.turns), self.question)

    def check_texts(self) -> None:
        """Check that every text can be tokenised.

        Raises:
            UserError: a field is not a string, or it holds half a character (a lone surrogate).
        """
        values = asdict(self)
        check_row(values, _REQUIRED, _OPTIONAL)
        check_text(values, "")

    @property
    def target(self) -> str:
        """The training target: the first alternative answer, or all required answers joined by ", "."""
        return self.answers[0] if self.match == "any" else ", ".join(self.answers)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> QARecord:
        """Build a record from JSON types.

        Raises:
            UserError: a field is missing, unknown or wrong.
        """
        given = {name: value for name, value in data.items() if value or name not in _OPTIONAL}
        check_row(given, _REQUIRED, _OPTIONAL)
        if (match := given.get("match", "any")) not in get_args(Match):
            raise UserError("match", match, " or ".join(get_args(Match)))
        passages, sentences = (
            tuple(Passage(item["title"], item["text"]) for item in given.pop(name, ()))
            for name in ("passages", "supporting_sentences")
        )
        turns = tuple(Turn(item["question"], item["answer"]) for item in given.pop("turns", ()))
        texts = {name: tuple(value) for name, value in given.items() if isinstance(value, list | tuple)}
        record = cls(passages=passages, turns=turns, supporting_sentences=sentences, **given | texts)
        check_record(record)
        return record


def asked_in_turn(questions: Sequence[QARecord]) -> list[QARecord]:
    """Turn questions about one context into a conversation: each gets the questions before it as earlier turns.

    Earlier turns have the reference answers (:attr:`QARecord.target`), not a model's answers, so no turn depends on how
    an earlier one went. Tasks are named "turn-1", "turn-2" and so on, and are scored separately.
    """
    turns = [Turn(record.question, record.target) for record in questions]
    return [
        replace(record, turns=tuple(turns[:place]), task=f"turn-{place + 1}") for place, record in enumerate(questions)
    ]


def read_records(path: Path) -> Iterator[QARecord]:
    """The records of a file that :func:`~lrsa_lit.data.reading.read_rows` can read."""
    return records_of(read_rows(path), QARecord.from_dict)


def records_of(rows: Iterable[Row], make: Callable[[Mapping[str, Any]], QARecord]) -> Iterator[QARecord]:
    """Yield the record that ``make`` builds from each row's fields.

    Raises:
        UserError: a row is bad; the error names its place.
    """
    for place, row in rows:
        with blamed_on(place):
            if not isinstance(row, dict):
                raise UserError("record", reason=f"is {kind_of(row)}", allowed="an object")
            record = make(row)
        yield record


def check_record(record: QARecord) -> None:
    """Raise a UserError for a field that is empty, is blank or contradicts another field."""
    for name in ("question", "answers", "passages"):
        if not getattr(record, name):
            raise UserError(name, reason="is empty, at least one is needed")
    check_name("task", record.task)
    if not all(answer.strip() for answer in record.answers):
        raise UserError("answers", list(record.answers), "a list of non-empty texts")
    if record.match == "verbatim" and (len(record.answers) > 1 or len(record.answers[0].split()) < 2):
        raise UserError("answers", list(record.answers), 'one answer of several words, as match is "verbatim"')
    for number, turn in enumerate(record.turns):
        for name in _TURN:
            if not getattr(turn, name).strip():
                raise UserError(f"turns[{number}].{name}", reason="is empty", allowed="a non-empty text")
    titles = {passage.title for passage in record.passages}
    if missing := [title for title in record.supporting_titles if title not in titles]:
        raise UserError("supporting_titles", missing[0], "the title of a passage")
    for sentence in record.supporting_sentences:
        if not is_in(sentence, record.passages):
            raise UserError("supporting_sentences", sentence.text, "a part of a passage with the same title")


def is_in(sentence: Passage, passages: Iterable[Passage]) -> bool:
    """Whether a passage with the sentence's title contains the sentence's text."""
    return any(sentence.text in passage.text for passage in passages if passage.title == sentence.title)


def check_name(field: str, value: str) -> None:
    """Raise a UserError for a value that cannot be part of a metric's name."""
    if not re.fullmatch(r"[\w.-]*", value):
        raise UserError(field, value, "made of letters, digits, dot, - and _")
