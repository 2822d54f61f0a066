"""Generated blocks within Markdown that is written by hand.

A block stands between two lines of their own, ``<!-- study:NAME -->`` and ``<!-- /study -->``. All else is
kept byte for byte.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from pathlib import Path
from typing import IO

from lrsa_lit.errors import UserError
from lrsa_lit.io import write_atomically

_MARK = re.compile(rb"^<!-- (?:study:(\S+)|/study) -->[^\S\n]*(?:\n|\Z)", re.MULTILINE)


def filled(path: Path, text_of: Callable[[str], str]) -> bytes:
    """The content of a file with each of its blocks written anew.

    Args:
        path: the file.
        text_of: gives the text of a block by its name; what it raises about the name gets the place.

    Raises:
        UserError: there is no such file, no block in it, one that is not closed, or one without a beginning.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(str(path), reason=f"it cannot be read ({error.strerror})") from None
    marks = list(_MARK.finditer(content))
    if not marks:
        reason = "it has no block; one is a line <!-- study:NAME --> and a line <!-- /study -->"
        raise UserError(str(path), reason=reason)
    parts, kept_from = [], 0
    for opening, closing in itertools.zip_longest(marks[::2], marks[1::2]):
        number = content.count(b"\n", 0, opening.start()) + 1
        where = f"{path}, line {number}"
        if not opening[1]:
            raise UserError(where, reason="<!-- /study --> closes nothing; allowed is one for each block")
        name = opening[1].decode()
        if closing is None or closing[1]:
            raise UserError(where, reason=f"the block {name!r} is not closed by a line <!-- /study -->")
        parts += [content[kept_from : opening.end()], _text(where, name, text_of)]
        kept_from = closing.start()
    return b"".join([*parts, content[kept_from:]])


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
        raise UserError(str(path), reason=f"it cannot be written ({error.strerror})") from None


def _text(where: str, name: str, text_of: Callable[[str], str]) -> bytes:
    try:
        text = text_of(name).encode()
    except UserError as error:
        raise UserError(where, reason=str(error)) from None
    if _MARK.search(text):
        raise UserError(where, reason=f"the text of the block {name!r} holds the mark of a block itself")
    # Markdown takes a table right after a comment for a part of it.
    return b"\n" + text + b"\n\n" if text else b""
