"""The questions of a data set with their full contexts, as a filter gets them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

from lrsa_lit.data.filters.context_filter import ContextFilter, Filtered
from lrsa_lit.data.module import QADataModule, Split
from lrsa_lit.data.prompts import PROMPT, Prompt, TooLong
from lrsa_lit.data.records import QARecord
from lrsa_lit.errors import UserError


def contexts(data: QADataModule, split: Split) -> Iterator[tuple[QARecord, Prompt]]:
    """Yield the questions of a split that fit, up to ``limit``, each with its prompt.

    The data set's own filter is not applied. The data sets of a mixture come one after another.

    Raises:
        UserError: the data set has no questions about passages.
    """
    parts: Sequence[QADataModule] = list(getattr(data, "data_sets", {"": data}).values())
    for part in parts:
        if not part.filterable:
            raise UserError("data", type(part).__name__, "a data set of questions about passages")
        if split in part.splits():
            yield from islice(_of_one(part, split), part.limit.get(split))


def _of_one(data: QADataModule, split: Split) -> Iterator[tuple[QARecord, Prompt]]:
    before, data.filter = data.filter, (seen := _Seen())
    try:
        for record in data.records(split):
            example = data.to_example(record)
            if not isinstance(example, TooLong):
                yield seen.handed.pop()
    finally:
        data.filter = before


@dataclass(frozen=True)
class _Seen(ContextFilter):
    """Changes nothing, and records what it was called with last."""

    handed: list[tuple[QARecord, Prompt]] = field(default_factory=list)

    def filtered(self, record: QARecord, prompt: Prompt = PROMPT) -> Filtered:
        self.handed[:] = [(record, prompt)]
        return Filtered(record, record, kept=(), dropped=(), tokens=0, tokens_left=0)

    def shorten(self, record: QARecord, prompt: Prompt) -> Sequence[str]:
        return [passage.text for passage in record.passages]
