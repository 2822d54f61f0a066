"""Readers for JSON lines, JSON and Parquet files, with the same checks for all and errors that name the place.

A UTF-8 byte order mark and the index column that pandas adds to Parquet files are skipped. Refused are text that is not
UTF-8, duplicate keys in an object, half a character (a lone surrogate, which no tokenizer and no table accepts),
numbers and nesting that exceed Python's limits, and damaged files. All errors are UserErrors that name the file and the
line (JSONL), item (JSON) or row (Parquet), counted from 1.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from lrsa_lit.errors import UserError, message_of

if TYPE_CHECKING:
    import pyarrow

Row: TypeAlias = tuple[str, Any]
"""The place of a value, as errors name it, and the value."""

SUFFIXES = (".jsonl", ".parquet", ".json")
"""Suffixes of the files that :func:`read_rows` reads."""

_BOM = "\ufeff"
_HALF = re.compile("[\ud800-\udfff]")
_ESCAPED_HALF = re.compile(r"\\u[dD][89a-fA-F]")
_PANDAS_INDEX = re.compile(r"__index_level_\d+__")
_ROWS_AT_ONCE = 64
_KINDS = {str: "a string", dict: "an object", int: "an integer"}


def read_rows(path: Path) -> Iterator[Row]:
    """The rows of a ``.jsonl`` file, a ``.parquet`` file (dictionaries), or a ``.json`` file with a list or lines."""
    if path.suffix not in SUFFIXES:
        raise UserError(str(path), reason=f"the suffix is {path.suffix!r}", allowed=" or ".join(SUFFIXES))
    if not path.is_file():
        raise UserError(str(path), reason="no such file")
    if path.suffix == ".parquet":
        return _read_parquet(path)
    if path.suffix == ".json" and (data := _bytes(path)).removeprefix(_BOM.encode()).lstrip().startswith(b"["):
        items = parse_json(data, str(path))
        return ((f"{path}, item {number}", row) for number, row in enumerate(items, start=1))
    return read_lines(path)


def read_text(path: Path) -> str:
    """Read a whole text file; line breaks stay unchanged."""
    data = _bytes(path)
    try:
        return data.decode("utf-8").removeprefix(_BOM)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{path}, line {line}", reason=f"byte {error.start + 1} of the file is not UTF-8{_hint(data)}"
        ) from None


def read_lines(path: Path) -> Iterator[Row]:
    """The values of a file with one JSON value per line; blank lines are skipped."""
    with _readable(path), path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.removeprefix(_BOM.encode()).strip():
                place = f"{path}, line {number}"
                yield place, parse_json(line, place)


def read_json(path: Path, kind: type) -> Any:
    """The content of a JSON file, whose outermost value must have the type ``kind`` (``list`` or ``dict``)."""
    content = parse_json(_bytes(path), str(path))
    if not isinstance(content, kind):
        raise UserError(str(path), reason=f"holds a {kind_of(content)}", allowed=_kind_name(kind))
    return content


def parse_json(data: bytes, place: str) -> Any:
    """Parse JSON in UTF-8; errors name ``place``."""
    try:
        text = data.decode("utf-8").removeprefix(_BOM)
        value = json.loads(text, object_pairs_hook=_object)
        if _ESCAPED_HALF.search(text):
            check_text(value, "")
        return value
    except UnicodeDecodeError as error:
        reason = f"not valid JSON (byte {error.start + 1} is not UTF-8){_hint(data)}"
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        reason = f"not valid JSON ({error.msg}, {line}column {error.colno}){_hint(data)}"
    except RecursionError:
        reason = "not readable JSON (it is nested too deeply)"
    except UserError as error:
        reason = str(error)
    except ValueError as error:
        # The only other ValueError is about numbers with too many digits.
        reason = f"not readable JSON ({message_of(error).partition(';')[0]})"
    raise UserError(place, reason=reason)


def check_text(value: object, field: str) -> None:
    """Raise a UserError if any text in a JSON value holds half a character (a lone surrogate).

    The error names the part of the value, as in ``field[0]`` or ``field.x``.
    """
    if isinstance(value, str):
        if found := _HALF.search(value):
            reason = f"holds half a character ({found[0]!a})"
            raise UserError(field or "value", reason=reason, allowed="whole Unicode text")
    elif isinstance(value, Mapping):
        for name, item in value.items():
            inside = _inside(field, str(name))
            check_text(name, inside)
            check_text(item, inside)
    elif isinstance(value, list | tuple):
        for number, item in enumerate(value):
            check_text(item, f"{field}[{number}]")


def check_shape(value: Any, shape: Any, field: str) -> None:
    """Raise a UserError if a value does not have the given shape; the error names the part that differs.

    Args:
        value: value of JSON types; lists may also be tuples.
        shape: a type, ``[shape]`` for a list of items of one shape, ``(shape, shape)`` for a list with exactly these
            items, or a dictionary with the shape of each required key.
        field: name of the value in errors.
    """
    kind: Any = shape if isinstance(shape, type) else dict if isinstance(shape, dict) else list
    if not isinstance(value, (list, tuple) if kind is list else kind) or (isinstance(value, bool) and kind is int):
        raise UserError(field or "value", reason=f"is {kind_of(value)}", allowed=_kind_name(kind))
    if isinstance(shape, dict):
        for name, inner in shape.items():
            if name not in value:
                raise UserError(_inside(field, name), reason="is missing")
            check_shape(value[name], inner, _inside(field, name))
    elif isinstance(shape, list | tuple):
        if isinstance(shape, tuple) and len(value) != len(shape):
            raise UserError(field or "value", reason=f"holds {len(value)} values", allowed=f"a list of {len(shape)}")
        inners = shape if isinstance(shape, tuple) else shape * len(value)
        for number, (item, inner) in enumerate(zip(value, inners, strict=True)):
            check_shape(item, inner, f"{field}[{number}]")


def check_row(row: Mapping[str, Any], required: Mapping[str, Any], optional: Mapping[str, Any]) -> None:
    """Raise a UserError if a row has an unknown field, lacks a required field, or has a field of the wrong shape.

    Shapes are as for :func:`check_shape`. Optional fields may be absent or null.
    """
    known = {**required, **optional}
    if unknown := [name for name in row if name not in known]:
        raise UserError(unknown[0], reason=f"no such field; fields are {', '.join(known)}")
    present = {name: shape for name, shape in optional.items() if row.get(name) is not None}
    check_shape(row, {**required, **present}, "")


@contextlib.contextmanager
def blamed_on(place: str, before: str = "") -> Iterator[None]:
    """Prefix UserErrors with the place that they come from, and ``before`` in front of their text."""
    try:
        yield
    except UserError as error:
        raise UserError(place, reason=f"{before}{error}") from None


def kind_of(value: object) -> str:
    """The name of a value's type in errors."""
    return "null" if value is None else type(value).__name__


def _kind_name(kind: type) -> str:
    return _KINDS.get(kind, f"a {kind.__name__}")


def _inside(field: str, name: str) -> str:
    return f"{field}.{name}" if field else name


def _bytes(path: Path) -> bytes:
    with _readable(path):
        return path.read_bytes()


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(str(path), reason=f"cannot be read ({error.strerror})") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(twice, reason="appears twice in one object")
    return found


def _hint(data: bytes) -> str:
    start = data[:1000]
    # In UTF-16, every second byte of Latin text is zero.
    likely = start[:2] in (b"\xff\xfe", b"\xfe\xff") or start.count(0) * 4 > len(start)
    return "; it looks like UTF-16, but must be UTF-8" if likely else ""


def _read_parquet(path: Path) -> Iterator[Row]:
    import pyarrow
    from pyarrow import parquet

    number = 0
    try:
        with parquet.ParquetFile(path, page_checksum_verification=True) as file:
            names = [name for name in file.schema_arrow.names if not _PANDAS_INDEX.fullmatch(name)]
            if twice := [name for name in names if names.count(name) > 1]:
                raise UserError(str(path), reason=f"field {twice[0]!r} appears twice")
            for batch in file.iter_batches(batch_size=_ROWS_AT_ONCE, columns=names):
                for row in _rows(batch, path, number):
                    number += 1
                    yield f"{path}, row {number}", row
    except (pyarrow.ArrowException, OSError) as error:
        where = f"damaged after row {number}" if number else "not a Parquet file, or damaged"
        raise UserError(str(path), reason=f"{where} ({message_of(error)})") from None


def _rows(batch: pyarrow.RecordBatch, path: Path, before: int) -> list[dict[str, Any]]:
    """The rows of a batch; ``before`` is the number of rows before it in the file."""
    try:
        batch.validate(full=True)
        rows: list[dict[str, Any]] = batch.to_pylist()
    except ValueError:
        # The error does not say where the damage is, so try each value.
        for number in range(len(batch)):
            for name in batch.schema.names:
                try:
                    part = batch.slice(number, 1).select([name])
                    part.validate(full=True)
                    part.to_pylist()
                except ValueError as error:
                    place = f"{path}, row {before + number + 1}"
                    raise UserError(place, reason=f"field {name!r} cannot be read ({message_of(error)})") from None
        raise UserError(str(path), reason=f"damaged after row {before}") from None
    return rows
