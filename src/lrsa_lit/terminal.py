"""What reaches the terminal beside plain prints: text is shown as it is, whatever files and stores have in it.

Rich would take brackets in a path or a name for markup, and fail at some, and would hand on control characters.
"""

from __future__ import annotations

import logging
from typing import Any

from rich.console import Console
from rich.logging import RichHandler
from rich.text import Text

from lrsa_lit.errors import printable, redacted


class PlainConsole(Console):
    """A console for which no text is markup, in tables and their titles too."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options | {"markup": False, "emoji": False, "highlight": False})

    def render_str(self, text: str, **options: Any) -> Text:
        """Rich's, of the text as it is."""
        return super().render_str(printable(text, keep="\n"), **options | {"markup": False, "emoji": False})

    def say(self, line: str) -> None:
        """Print a line unwrapped, so that paths and commands in it can be copied."""
        self.print(printable(line), soft_wrap=True)


class _Formatter(logging.Formatter):
    """One line for a message of this project; those of others may have several, and so may tracebacks."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - the name is logging's
        own = record.name.partition(".")[0] == "lrsa_lit"
        return printable(redacted(super().formatMessage(record)), keep="" if own else "\n\t")


def log_to(console: Console | None = None) -> None:
    """Log warnings, and this project's lines, to a console; to the standard output if there is none."""
    handler = RichHandler(console=console or PlainConsole(), show_path=False, show_time=False)
    handler.setFormatter(_Formatter("%(message)s"))
    logging.basicConfig(handlers=[handler])
    logging.getLogger("lrsa_lit").setLevel(logging.INFO)
