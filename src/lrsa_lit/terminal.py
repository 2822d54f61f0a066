"""Print and log to the terminal with text shown literally, even if it comes from files and stores.

By default, Rich would interpret brackets in paths and names as markup, fail on some, and pass on control characters.
"""

from __future__ import annotations

import logging
import os
from typing import Any

from rich.console import Console
from rich.logging import RichHandler
from rich.text import Text

from lrsa_lit.errors import printable, redacted

_FILE_WIDTH = 200
"""Columns of tables in a file or a pipe, which has no width of its own; Rich would take 80."""


class PlainConsole(Console):
    """A console that treats no text as markup, including tables and their titles."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options | {"markup": False, "emoji": False, "highlight": False})
        # A notebook has its own width.
        if not (self.is_terminal or self.is_jupyter or options.get("width") or os.environ.get("COLUMNS")):
            self.width = _FILE_WIDTH

    def render_str(self, text: str, **options: Any) -> Text:
        """Render text literally."""
        return super().render_str(printable(text, keep="\n"), **options | {"markup": False, "emoji": False})

    def say(self, line: str) -> None:
        """Print a line without wrapping, so that paths and commands in it can be copied."""
        self.print(printable(line), soft_wrap=True)


class _Formatter(logging.Formatter):
    """Prints this project's messages in one line each; messages of others and tracebacks may have several lines."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - the name is logging's
        own = record.name.partition(".")[0] == "lrsa_lit"
        return printable(redacted(super().formatMessage(record)), keep="" if own else "\n\t")


class _Handler(RichHandler):
    """Wraps messages to the width of a terminal. Elsewhere, such as in a log file, it does not wrap them."""

    def emit(self, record: logging.LogRecord) -> None:
        if self.console.is_terminal:
            super().emit(record)
            return
        try:
            self.console.print(Text(f"{record.levelname:<8} {self.format(record)}"), soft_wrap=True)
        except Exception:
            self.handleError(record)


def log_to(console: Console | None = None) -> None:
    """Log all warnings and this project's messages to a console; to standard output if None."""
    handler = _Handler(console=console or PlainConsole(), show_path=False, show_time=False)
    handler.setFormatter(_Formatter("%(message)s"))
    # This library also prints its records itself.
    handler.addFilter(lambda record: record.name.partition(".")[0] != "huggingface_hub")
    logging.basicConfig(handlers=[handler])
    logging.getLogger("lrsa_lit").setLevel(logging.INFO)
