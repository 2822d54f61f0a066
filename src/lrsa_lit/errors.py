"""The exception that means "the user can mend this", shown as a single line with exit code 2, and what others say."""

from __future__ import annotations

import re
import unicodedata

_TURNS = ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")
# A password may hold slashes.
_USER = re.compile(r"(?<=://)(?:[^/\s]*@|[^/\s:@]*:[^\s@]*@)")
_OPTION = re.compile(
    r"([?&](?:\w*password|passwd|pwd|odbc_connect|\w*token|\w*secret|user|username)=)[^&\s\"']+", re.IGNORECASE
)


class UserError(ValueError):
    """A mistake in a config, a file or an argument.

    The message is one line that names the key, the value and what is allowed. The command line prints it
    without a traceback and exits with code 2; library users catch it as a :class:`ValueError`.
    """


def said(error: BaseException) -> str:
    """What an error says, in one line."""
    return " ".join(str(error).split())


def printable(text: str, keep: str = "") -> str:
    """Text of files and stores as a terminal may show it: control characters stand as their escapes in Python.

    Escaped are also line ends, lone surrogates, which no stream can encode, and what turns the direction of writing.

    Args:
        text: the text.
        keep: characters that stay as they are, such as line ends.
    """
    return "".join(char if char in keep or not _controls(char) else _escaped(char) for char in text)


def _controls(char: str) -> bool:
    return unicodedata.category(char) in ("Cc", "Cs", "Zl", "Zp") or unicodedata.bidirectional(char) in _TURNS


def _escaped(char: str) -> str:
    return char.encode("unicode_escape").decode("ascii")


def redacted(text: str) -> str:
    """Text without the user names and passwords of the addresses in it."""
    return _OPTION.sub(r"\1***", _USER.sub("", text))
