"""Generated blocks within Markdown that is written by hand.

A block stands between two lines of their own, ``<!-- study:NAME -->`` and ``<!-- /study -->``. All else is
kept byte for byte.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import IO

from lrsa_lit.errors import UserError
from lrsa_lit.io import write_atomically

_OPEN = re.compile(rb"<!-- study:(\S+) -->\s*")
_CLOSE = re.compile(rb"<!-- /study -->\s*")


def filled(path: Path, text_of: Callable[[str], str]) -> bytes:
    """The content of a file with each of its blocks written anew.

    Args:
        path: the file.
        text_of: gives the text of a block by its name; what it raises about the name gets the place.

    Raises:
        UserError: there is no such file, no block in it, one that is not closed, or one without a beginning.
    """
    parts: list[bytes] = []
    opened: tuple[int, bytes] | None = None
    found = False
    for number, line in enumerate(_content(path).splitlines(keepends=True), start=1):
        if opening := _OPEN.fullmatch(line):
            if opened:
                raise _unclosed(path, *opened)
            opened, found = (number, opening[1]), True
            parts.append(line)
            parts.append(_text(path, number, opening[1].decode(), text_of))
        elif _CLOSE.fullmatch(line):
            if opened is None:
                raise UserError(f"{path}, line {number}: <!-- /study --> closes nothing; allowed is one for each block")
            opened = None
            parts.append(line)
        elif opened is None:
            parts.append(line)
    if opened:
        raise _unclosed(path, *opened)
    if not found:
        raise UserError(f"{path}: it has no block; one is a line <!-- study:NAME --> and a line <!-- /study -->")
    return b"".join(parts)


def replace(path: Path, content: bytes) -> None:
    """Give a file another content at once; one that exists keeps its permissions.

    Raises:
        UserError: it cannot be written.
    """

    def write(file: IO[bytes]) -> None:
        if path.exists():
            Path(file.name).chmod(path.stat().st_mode)
        file.write(content)

    try:
        write_atomically(path, write)
    except OSError as error:
        raise UserError(f"{path}: it cannot be written ({error.strerror})") from None


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: it cannot be read ({error.strerror})") from None


def _text(path: Path, number: int, name: str, text_of: Callable[[str], str]) -> bytes:
    try:
        text = text_of(name)
    except UserError as error:
        raise UserError(f"{path}, line {number}: {error}") from None
    if any(mark.fullmatch(line) for line in text.encode().splitlines(keepends=True) for mark in (_OPEN, _CLOSE)):
        raise UserError(f"{path}, line {number}: the text of the block {name!r} holds the mark of a block itself")
    # Markdown takes a table right after a comment for a part of it.
    return f"\n{text}\n\n".encode() if text else b""


def _unclosed(path: Path, number: int, name: bytes) -> UserError:
    return UserError(f"{path}, line {number}: the block {name.decode()!r} is not closed by a line <!-- /study -->")
