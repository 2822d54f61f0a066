"""The file of summaries that is written once and read by a filter: one JSON object a line, by the passage's digest."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

from lrsa_lit.data.reading import Row, blamed_on, check_row, kind_of
from lrsa_lit.errors import UserError

_ROW = {"passage": str, "by": str, "summary": str}


def digest_of_text(text: str) -> str:
    """SHA-256 of a passage's text, without its title: hex."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def line_of(text: str, by: str, summary: str) -> dict[str, str]:
    """A line of the file.

    Args:
        text: of the passage.
        by: digest of the model, and of the settings, that wrote the summary.
        summary: "" where the model wrote none.
    """
    return {"passage": digest_of_text(text), "by": by, "summary": summary}


def summaries_of(rows: Iterable[Row], by: str | None = None) -> dict[str, str]:
    """The summary of each passage, by the passage's digest.

    Args:
        rows: of the file.
        by: who must have written all of them; None: anybody, but all of them the same.

    Raises:
        UserError: a row is no such line, or summaries are by different models or settings.
    """
    found: dict[str, str] = {}
    for place, row in rows:
        with blamed_on(place):
            if not isinstance(row, dict):
                raise UserError("summary", reason=f"is {kind_of(row)}", allowed="an object")
            check_row(row, _ROW, {})
            by = row["by"] if by is None else by
            if row["by"] != by:
                hint = "let each model and each max_new_tokens have a file of its own"
                raise UserError("by", reason="is another model, or other settings", hint=hint)
        found[row["passage"]] = row["summary"]
    return found
