"""Rows of other people's data sets as canonical records: renamed, unpacked and wrapped, never guessed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lrsa_lit.data.reading import kind_of
from lrsa_lit.data.records import QARecord
from lrsa_lit.errors import UserError

_FIELDS = tuple(QARecord.__dataclass_fields__)
_OPTIONAL = ("id", "supporting_titles", "match", "task")


def check_fields(fields: Mapping[str, str]) -> None:
    """Refuse a mapping of fields that do not exist.

    Raises:
        UserError: a key is no canonical field.
    """
    if wrong := [name for name in fields if name not in _FIELDS]:
        raise UserError("fields", wrong[0], f"one of {', '.join(_FIELDS)}")


def canonical(row: Mapping[str, Any], fields: Mapping[str, str], default_id: str) -> dict[str, Any]:
    """A row as the dictionary :meth:`QARecord.from_dict` takes.

    Args:
        row: of the data set; columns that are neither named by ``fields`` nor called like a canonical field are
            ignored.
        fields: where to find a canonical field; dots lead into nested columns ("answers.text").
        default_id: the id of a row that has none.

    Raises:
        UserError: a field that is needed, or that ``fields`` names, is not there.
    """
    record: dict[str, Any] = {}
    for name in _FIELDS:
        if name in fields or name in row or name not in _OPTIONAL:
            record[name] = _shaped(name, _find(row, fields.get(name, name)))
    if record.get("id") is None:
        record["id"] = default_id
    return record


def _find(row: Mapping[str, Any], path: str) -> object:
    value: Any = row
    for name in path.split("."):
        if not isinstance(value, Mapping) or name not in value:
            raise UserError(path, reason=f"no such column; there are {', '.join(row)}", hint="fields can name another")
        value = value[name]
    return value


def _shaped(name: str, value: object) -> object:
    """One string may stand for a list of one, one or several plain texts for passages, and a number for an id."""
    if name == "id":
        if isinstance(value, bool) or not isinstance(value, str | int | float | None):
            raise UserError("id", reason=f"is {kind_of(value)}", allowed="a string or a number")
        return None if value is None else str(value)
    if name in ("answers", "supporting_titles"):
        texts = [value] if isinstance(value, str) else value
        return _without_repeats(texts) if isinstance(texts, list) else texts
    return _passages(value) if name == "passages" else value


def _without_repeats(values: list[Any]) -> list[Any]:
    return [value for place, value in enumerate(values) if value not in values[:place]]


def _passages(value: object) -> object:
    if isinstance(value, Mapping):  # how `datasets` stores a list of objects: an object of lists
        value = _unpacked(value)
    items = [value] if isinstance(value, str) else value
    return [_passage(item) for item in items] if isinstance(items, list) else items


def _unpacked(columns: Mapping[str, Any]) -> list[dict[str, Any]]:
    titles, texts = columns.get("title", []), columns.get("text", columns.get("sentences", []))
    if not isinstance(titles, list) or not isinstance(texts, list) or len(titles) != len(texts):
        raise UserError("passages", allowed="a list, or an object with as many titles as texts")
    return [{"title": title, "text": text} for title, text in zip(titles, texts, strict=True)]


def _passage(item: object) -> object:
    if isinstance(item, str):
        return {"title": "", "text": item}
    if isinstance(item, Mapping) and isinstance(sentences := item.get("text"), list):
        if wrong := [sentence for sentence in sentences if not isinstance(sentence, str)]:
            raise UserError("passages", reason=f"holds {kind_of(wrong[0])}", allowed="of sentences of text")
        return {**item, "text": "".join(sentences)}
    return item
