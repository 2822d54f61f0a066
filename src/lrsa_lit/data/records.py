"""The canonical record: a question, the passages it is asked about and its answers; read from JSONL and Parquet."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast, get_args

from lrsa_lit.data.reading import Row, check_row, check_text, kind_of, read_rows
from lrsa_lit.errors import UserError
from lrsa_lit.evaluation.answer_scores import Match

_REQUIRED = {"id": str, "passages": [{"title": str, "text": str}], "question": str, "answers": [str]}
_OPTIONAL = {"supporting_titles": [str], "match": str, "task": str}


@dataclass(frozen=True)
class Passage:
    """A piece of the context. An empty title is not shown in the prompt."""

    title: str
    text: str


@dataclass(frozen=True)
class QARecord:
    """One question.

    Attributes:
        id: unique within a data set.
        passages: the context, in order.
        question: the question.
        answers: the reference answers, at least one.
        supporting_titles: titles of the passages that hold the answer; may be empty.
        match: ``"any"``: the answers are alternatives, ``"all"``: every one is required.
        task: what kind of question it is, where a data set has several; each gets scores of its own.
    """

    id: str
    passages: tuple[Passage, ...]
    question: str
    answers: tuple[str, ...]
    supporting_titles: tuple[str, ...] = ()
    match: Match = "any"
    task: str = ""

    def check_texts(self) -> None:
        """Refuse what no tokenizer takes.

        Raises:
            UserError: a text is no string, or holds half a character; the message names the field.
        """
        values = self.to_dict()
        check_row(values, _REQUIRED, _OPTIONAL)
        check_text(values, "")

    @property
    def target(self) -> str:
        """The text to learn: the first of alternative answers, or all required ones joined by ", "."""
        return self.answers[0] if self.match == "any" else ", ".join(self.answers)

    def to_dict(self) -> dict[str, Any]:
        """The record as JSON types; the inverse of :meth:`from_dict`."""
        return cast("dict[str, Any]", _jsonable(asdict(self)))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> QARecord:
        """Build a record from JSON types.

        Raises:
            UserError: a field is missing, unknown, of another type or empty; the message names it.
        """
        given = {name: value for name, value in data.items() if value or name not in _OPTIONAL}
        check_row(given, _REQUIRED, _OPTIONAL)
        if (match := given.get("match", "any")) not in get_args(Match):
            raise UserError("match", match, " or ".join(get_args(Match)))
        passages = tuple(Passage(item["title"], item["text"]) for item in given.pop("passages"))
        texts = {name: tuple(value) for name, value in given.items() if isinstance(value, list)}
        record = cls(passages=passages, **given | texts)
        check_record(record)
        return record


def read_records(path: Path) -> Iterator[QARecord]:
    """The records of a file that :func:`~lrsa_lit.data.reading.read_rows` takes.

    Raises:
        UserError: it cannot be read, or holds a broken record; the message gives the file and its line or row.
    """
    return records_of(read_rows(path), QARecord.from_dict)


def records_of(rows: Iterable[Row], make: Callable[[Mapping[str, Any]], QARecord]) -> Iterator[QARecord]:
    """The record of each row.

    Args:
        rows: as :mod:`lrsa_lit.data.reading` reads them.
        make: a record from a row's fields.

    Raises:
        UserError: a row is no object, or ``make`` complains about it; the message gives its place.
    """
    for place, row in rows:
        try:
            if not isinstance(row, dict):
                raise UserError("record", reason=f"is {kind_of(row)}", allowed="an object")
            record = make(row)
        except UserError as error:
            raise UserError(place, reason=str(error)) from None
        yield record


def check_record(record: QARecord) -> None:
    """Refuse a record that is no question with an answer.

    Raises:
        UserError: a field is empty, blank or contradicts another.
    """
    for name in ("question", "answers", "passages"):
        if not getattr(record, name):
            raise UserError(name, reason="is empty, at least one is needed")
    check_name("task", record.task)
    if not all(answer.strip() for answer in record.answers):
        raise UserError("answers", list(record.answers), "of texts that are not empty")
    titles = {passage.title for passage in record.passages}
    if missing := [title for title in record.supporting_titles if title not in titles]:
        raise UserError("supporting_titles", missing[0], "the title of a passage")


def check_name(field: str, value: str) -> None:
    """Refuse what cannot be part of a metric's name.

    Raises:
        UserError: the value of the field has other characters than letters, digits, dot, - and _.
    """
    if not re.fullmatch(r"[\w.-]*", value):
        raise UserError(field, value, "of letters, digits, dot, - and _")


def _jsonable(value: object) -> object:
    if isinstance(value, dict):
        return {key: _jsonable(item) for key, item in value.items()}
    return [_jsonable(item) for item in value] if isinstance(value, tuple | list) else value
