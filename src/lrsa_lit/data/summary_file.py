"""The file of summaries that a filter reads: one JSON object per line, keyed by the digest of the passage."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

from lrsa_lit.data.reading import Row, blamed_on, check_row, kind_of
from lrsa_lit.errors import UserError

_ROW = {"passage": str, "by": str, "summary": str}


def digest_of_text(text: str) -> str:
    """SHA-256 of a passage's text, without its title, as hex digits."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def line_of(text: str, by: str, summary: str) -> dict[str, str]:
    """A line of the file.

    Args:
        text: the passage's text.
        by: digest of the model and settings that wrote the summary.
        summary: the summary; "" if the model wrote none.
    """
    return {"passage": digest_of_text(text), "by": by, "summary": summary}


def summaries_of(rows: Iterable[Row], by: str | None = None) -> dict[str, str]:
    """Read the summaries, keyed by the digests of their passages.

    Args:
        rows: the rows of the file.
        by: digest of the writer that all summaries must have; None accepts any writer, but only one.

    Raises:
        UserError: a row does not have the format of :func:`line_of`, or summaries come from different models or
            settings.
    """
    found: dict[str, str] = {}
    for place, row in rows:
        with blamed_on(place):
            if not isinstance(row, dict):
                raise UserError("summary", reason=f"is {kind_of(row)}", allowed="an object")
            check_row(row, _ROW, {})
            by = row["by"] if by is None else by
            if row["by"] != by:
                hint = "use a separate file for each model and each max_new_tokens"
                raise UserError("by", reason="is another model, or other settings", hint=hint)
        found[row["passage"]] = row["summary"]
    return found
