"""UserError, for mistakes that users can fix, and helpers for one-line messages."""

from __future__ import annotations

import contextlib
import re
import unicodedata
from collections.abc import Iterator

_TURNS = ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")
# A password may hold slashes.
_USER = re.compile(r"(?<=://)(?:[^/\s]*@|[^/\s:@]*:[^\s@]*@)")
_OPTION = re.compile(
    r"([?&](?:\w*password|passwd|pwd|odbc_connect|\w*token|\w*secret|user|username)=)[^&\s\"']+", re.IGNORECASE
)


class UserError(ValueError):
    """A mistake in a config, a file or an argument, with a message of one line.

    The command line prints it without a traceback and exits with code 2; library users can catch it as a
    :class:`ValueError`.

    Args:
        field: the name of the wrong argument (``max_tokens``), file, variable or option.
        value: the given value; None if there is nothing to show.
        allowed: what the value must be: "an integer >= 1".
        reason: what is wrong, if "is not allowed" says too little: "is a folder".
        hint: how to fix it, if ``allowed`` says too little: "use ddp instead".
    """

    def __init__(
        self, field: str, value: object = None, allowed: str = "", *, reason: str = "", hint: str = ""
    ) -> None:
        super().__init__(field, value, allowed)
        if not (reason or hint or allowed) and value is None:
            field, _, reason = field.partition(": ")
        self.field, self.value, self.allowed, self.reason, self.hint = field, value, allowed, reason, hint

    def __str__(self) -> str:
        wrong = self.reason
        if self.value is not None:
            shown = repr(self.value) if isinstance(self.value, str) else self.value
            wrong = f"{shown} {self.reason or 'is not allowed'}"
        told = "; ".join(filter(None, (wrong, self.allowed and f"it must be {self.allowed}", self.hint)))
        return printable(f"{self.field}: {told}" if told else self.field)


@contextlib.contextmanager
def under(key: str) -> Iterator[None]:
    """In a with block, prefix the fields of UserErrors with a key: ``top_k`` becomes ``KEY.top_k``."""
    try:
        yield
    except UserError as error:
        error.field = f"{key}.{error.field}"
        raise


@contextlib.contextmanager
def named(field: str) -> Iterator[None]:
    """In a with block, replace the fields of UserErrors by ``field``."""
    try:
        yield
    except UserError as error:
        error.field = field
        raise


def message_of(error: BaseException) -> str:
    """The message of an error in one line."""
    return " ".join(str(error).split())


def printable(text: str, keep: str = "") -> str:
    """Make text from files and stores safe for a terminal: control characters become Python escapes.

    So do line ends, lone surrogates (which no stream can encode) and characters that change the writing direction.
    Characters in ``keep`` are not escaped.
    """

    def controls(char: str) -> bool:
        return unicodedata.category(char) in ("Cc", "Cs", "Zl", "Zp") or unicodedata.bidirectional(char) in _TURNS

    escaped = (char.encode("unicode_escape").decode() if controls(char) and char not in keep else char for char in text)
    return "".join(escaped)


def redacted(text: str) -> str:
    """Remove user names, passwords and tokens from the addresses in a text."""
    return _OPTION.sub(r"\1***", _USER.sub("", text))
