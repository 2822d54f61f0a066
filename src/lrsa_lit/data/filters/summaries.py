"""Passages replaced by summaries that a model wrote in advance, whatever the question (CoLoR, arXiv 2412.18232)."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lrsa_lit.data.filters.context_filter import ContextFilter, Filtered
from lrsa_lit.data.prompts import PROMPT, Prompt
from lrsa_lit.data.reading import read_lines
from lrsa_lit.data.records import QARecord
from lrsa_lit.data.summary_file import digest_of_text, summaries_of
from lrsa_lit.errors import UserError
from lrsa_lit.paths import resolve


@dataclass(frozen=True)
class Summarised(Filtered):
    """A record with summaries in place of its passages.

    Attributes:
        missing: number of passages without a summary, or with an empty one; they stay unchanged.
    """

    missing: int = 0

    def counts(self) -> dict[str, int]:
        """The counts of every filter, plus the passages without a summary."""
        passages = {"passages": len(self.source.passages), "passages without a summary": self.missing}
        return super().counts() | passages


@dataclass(frozen=True)
class Summaries(ContextFilter):
    """Replace each passage's text by its summary; passages without a summary, or with an empty one, stay unchanged.

    The result does not depend on the question, so it can be cached for further questions.

    Args:
        map: file of summaries, written by ``lrsa summarise``.
    """

    map: str

    def __post_init__(self) -> None:
        """Read the file once; raise a UserError if it is not a file of summaries."""
        self._summaries  # noqa: B018 - reports errors early

    @property
    def _summaries(self) -> dict[str, str]:
        path = resolve(self.map, key="map")
        about = path.stat()
        return _read(path, about.st_size, about.st_mtime_ns)

    def filtered(self, record: QARecord, prompt: Prompt = PROMPT) -> Summarised:
        """The record with summaries, and what it lost."""
        missing = self._found(record).count("")
        return Summarised(**vars(super().filtered(record, prompt)), missing=missing)

    def shorten(self, record: QARecord, prompt: Prompt) -> Sequence[str]:
        """The summary of each passage, or its text if there is no summary."""
        found = zip(self._found(record), record.passages, strict=True)
        return [summary or passage.text for summary, passage in found]

    def _found(self, record: QARecord) -> list[str]:
        """The summary of each passage in the file; "" if there is none."""
        known = self._summaries
        return [known.get(digest_of_text(passage.text), "") for passage in record.passages]


@functools.lru_cache(maxsize=4)
def _read(path: Path, size: int, changed: int) -> dict[str, str]:
    found = summaries_of(read_lines(path))
    if not found:
        raise UserError("map", path, "a file with summaries", reason="has no summaries")
    return found
