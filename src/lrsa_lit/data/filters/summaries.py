"""Passages rewritten shorter by a model beforehand, whatever is asked about them (CoLoR, arXiv 2412.18232)."""

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
    """A record with summaries in the place of its passages.

    Attributes:
        missing: how many of its passages have none in the file, or an empty one, and so stay as they are.
    """

    missing: int = 0

    def counts(self) -> dict[str, int]:
        """Those of any filter, and the passages that stay as they are."""
        passages = {"passages": len(self.source.passages), "passages without a summary": self.missing}
        return super().counts() | passages


@dataclass(frozen=True)
class Summaries(ContextFilter):
    """The summary of each passage in its place, its title as it is. A passage without one, or an empty one, stays.

    What is left does not depend on the question, so it can be cached, and further questions be asked about it.

    Args:
        map: the file that ``lrsa summarise`` has written.
    """

    map: str

    def __post_init__(self) -> None:
        """Read the file once; a UserError if it is no such file."""
        self._summaries  # noqa: B018 - an error is for now

    @property
    def _summaries(self) -> dict[str, str]:
        path = resolve(self.map, key="map")
        about = path.stat()
        return _read(path, about.st_size, about.st_mtime_ns)

    def filtered(self, record: QARecord, prompt: Prompt = PROMPT) -> Summarised:
        """The record with its summaries, and what it lost."""
        missing = self._found(record).count("")
        return Summarised(**vars(super().filtered(record, prompt)), missing=missing)

    def shorten(self, record: QARecord, prompt: Prompt) -> Sequence[str]:
        """The summaries."""
        found = zip(self._found(record), record.passages, strict=True)
        return [summary or passage.text for summary, passage in found]

    def _found(self, record: QARecord) -> list[str]:
        """What the file has for each passage; "" for nothing."""
        known = self._summaries
        return [known.get(digest_of_text(passage.text), "") for passage in record.passages]


@functools.lru_cache(maxsize=4)
def _read(path: Path, size: int, changed: int) -> dict[str, str]:
    found = summaries_of(read_lines(path))
    if not found:
        raise UserError("map", path, "a file with summaries", reason="has none")
    return found
