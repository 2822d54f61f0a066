"""The canonical record: a question, the passages it is asked about and its answers; read from JSONL and Parquet."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast, get_args

from lrsa_lit.errors import UserError, said
from lrsa_lit.metrics import Match

SUFFIXES = (".jsonl", ".parquet")


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
        _check_names(data)
        record = cls(
            id=_text(data, "id"),
            passages=tuple(_passage(item, position) for position, item in enumerate(_list(data, "passages"))),
            question=_text(data, "question"),
            answers=_texts(data, "answers"),
            supporting_titles=_texts(data, "supporting_titles") if data.get("supporting_titles") else (),
            match=_match(data),
            task=_text(data, "task") if data.get("task") else "",
        )
        _check_values(record)
        return record


def read_records(path: Path) -> Iterator[QARecord]:
    """The records of a ``.jsonl`` file (one JSON object a line, blank lines skipped) or a ``.parquet`` file.

    Raises:
        UserError: no such file, another suffix, or a broken record; the message gives the file and its line
            (JSONL) or row (Parquet), counted from 1.
    """
    if path.suffix not in SUFFIXES:
        raise UserError(f"{path}: the suffix is {path.suffix!r}, allowed are {', '.join(SUFFIXES)}")
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    return read_jsonl(path) if path.suffix == ".jsonl" else _read_parquet(path)


def read_json(path: Path, kind: type) -> Any:
    """The content of a JSON file.

    Raises:
        UserError: it is not JSON, or the outermost value is not of the kind (``list`` or ``dict``).
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid JSON ({said(error)})") from None
    if not isinstance(content, kind):
        raise UserError(f"{path}: holds a {_kind(content)}, allowed is a {kind.__name__}")
    return content


def read_jsonl(path: Path, make: Callable[[Mapping[str, Any]], QARecord] | None = None) -> Iterator[QARecord]:
    """The records of a file with one JSON object a line; blank lines are skipped.

    Args:
        path: the file.
        make: a record from a line's object; null for the canonical format.

    Raises:
        UserError: a line is broken, or ``make`` complains about it; the message gives the file and the line.
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield _located(f"{path}, line {number}", partial(_parse, line), make or QARecord.from_dict)


def _read_parquet(path: Path) -> Iterator[QARecord]:
    import pyarrow
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise UserError(f"{path}: not a Parquet file ({said(error)})") from None
    with file:
        rows = (row for batch in file.iter_batches(batch_size=64) for row in batch.to_pylist())
        for number, row in enumerate(rows, start=1):
            yield _located(f"{path}, row {number}", partial(dict, row), QARecord.from_dict)


def _parse(line: bytes) -> object:
    return json.loads(line.decode("utf-8"))  # given bytes, json.loads lets some that are not UTF-8 pass


def _located(place: str, load: Callable[[], Any], make: Callable[[Mapping[str, Any]], QARecord]) -> QARecord:
    """Load and check one record; its errors name the place."""
    try:
        data = load()
        if not isinstance(data, dict):
            raise UserError(f"a record must be an object, got {_kind(data)}")
        return make(data)
    except UserError as error:
        raise UserError(f"{place}: {error}") from None
    except json.JSONDecodeError as error:
        # It counts lines within the one that it was given.
        raise UserError(f"{place}: not valid JSON ({error.msg}, column {error.colno})") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{place}: not valid JSON ({said(error)})") from None


def check_name(field: str, value: str) -> None:
    """Refuse what cannot be part of a metric's name.

    Raises:
        UserError: the value of the field has other characters than letters, digits, dot, - and _.
    """
    if not re.fullmatch(r"[\w.-]*", value):
        raise UserError(f"field {field!r} is {value!r}, allowed are letters, digits, dot, - and _")


def _check_names(data: Mapping[str, Any]) -> None:
    allowed = tuple(QARecord.__dataclass_fields__)
    if unknown := [name for name in data if name not in allowed]:
        raise UserError(f"unknown field {unknown[0]!r}, allowed are {', '.join(allowed)}")


def _check_values(record: QARecord) -> None:
    for name in ("question", "answers", "passages"):
        if not getattr(record, name):
            raise UserError(f"field {name!r} is empty, at least one is needed")
    check_name("task", record.task)
    if not all(answer.strip() for answer in record.answers):
        raise UserError(f"field 'answers' holds an empty string: {list(record.answers)}")
    titles = {passage.title for passage in record.passages}
    if missing := [title for title in record.supporting_titles if title not in titles]:
        raise UserError(f"field 'supporting_titles' names {missing[0]!r}, which is the title of no passage")


def _passage(item: object, position: int) -> Passage:
    if not isinstance(item, dict):
        raise UserError(f"field 'passages[{position}]' must be an object with title and text, got {_kind(item)}")
    return Passage(*(_text(item, name, f"passages[{position}].{name}") for name in ("title", "text")))


def _text(data: Mapping[str, Any], name: str, shown: str | None = None) -> str:
    value = _value(data, name, shown)
    if not isinstance(value, str):
        raise UserError(f"field {shown or name!r} must be a string, got {_kind(value)}")
    return value


def _list(data: Mapping[str, Any], name: str) -> list[Any]:
    value = _value(data, name)
    if not isinstance(value, list):
        raise UserError(f"field {name!r} must be a list, got {_kind(value)}")
    return value


def _texts(data: Mapping[str, Any], name: str) -> tuple[str, ...]:
    values = _list(data, name)
    if wrong := [value for value in values if not isinstance(value, str)]:
        raise UserError(f"field {name!r} must be a list of strings, got one of {_kind(wrong[0])}")
    return tuple(values)


def _match(data: Mapping[str, Any]) -> Match:
    value = data.get("match") or "any"
    if value not in get_args(Match):
        raise UserError(f"field 'match' is {value!r}, allowed are {', '.join(get_args(Match))}")
    return cast("Match", value)


def _value(data: Mapping[str, Any], name: str, shown: str | None = None) -> object:
    if name not in data:
        raise UserError(f"field {shown or name!r} is missing")
    return data[name]


def _kind(value: object) -> str:
    return "null" if value is None else type(value).__name__


def _jsonable(value: object) -> object:
    if isinstance(value, dict):
        return {key: _jsonable(item) for key, item in value.items()}
    return [_jsonable(item) for item in value] if isinstance(value, tuple | list) else value
