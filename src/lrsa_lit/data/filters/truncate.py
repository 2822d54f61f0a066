"""Truncation: removes the middle, the end or the beginning of a context."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from lrsa_lit.bounds import check_setting
from lrsa_lit.data.filters.context_filter import Budgeted, with_texts
from lrsa_lit.data.prompts import Prompt
from lrsa_lit.data.records import QARecord
from lrsa_lit.data.tokenization import Span, encode_text


@dataclass(frozen=True)
class Truncate(Budgeted):
    """Keep the first and the last tokens of a context, half of the budget each, as LongBench truncates.

    Args:
        cut: part that is removed: the middle, the end or the beginning. A passage that is kept in part keeps its title.
    """

    cut: Literal["middle", "end", "beginning"] = field(default="middle", kw_only=True)

    def __post_init__(self) -> None:
        """Check the settings."""
        super().__post_init__()
        check_setting("cut", self.cut, self.cut in ("middle", "end", "beginning"), "middle, end or beginning")

    def shorten(self, record: QARecord, prompt: Prompt) -> Sequence[str]:
        """The passages outside of the cut, and the parts of passages at its edges."""
        total = self.count(record.passages, prompt)
        if (budget := self.budget(total, record, prompt)) >= total:
            return [passage.text for passage in record.passages]
        titles = self.title_tokens(record.passages, prompt)
        spans = [encode_text(self.tokenizer, passage.text).offsets for passage in record.passages]
        room = budget
        while room > 0:
            left = self._left(record, spans, titles, room)
            # Joining the two ends may change the tokenisation and add tokens.
            if (excess := self.count(with_texts(record.passages, left), prompt) - budget) <= 0:
                return left
            room -= excess
        return [""] * len(record.passages)

    def _left(self, record: QARecord, spans: Sequence[Sequence[Span]], titles: Sequence[int], room: int) -> list[str]:
        lengths = list(map(len, spans))
        first = {"middle": room - room // 2, "end": room, "beginning": 0}[self.cut]
        heads = _taken(range(len(lengths)), lengths, titles, first)
        # The tail must not repeat what the head already shows of a passage.
        rest = [length - head for length, head in zip(lengths, heads, strict=True)]
        unshown = [0 if head else title for title, head in zip(titles, heads, strict=True)]
        tails = _taken(reversed(range(len(lengths))), rest, unshown, room - first)
        parts = zip(record.passages, spans, heads, tails, strict=True)
        return [_ends(passage.text, offsets, head, tail) for passage, offsets, head, tail in parts]


def _taken(order: Iterable[int], lengths: Sequence[int], titles: Sequence[int], room: int) -> list[int]:
    """How many tokens of each passage are kept when passages are added in ``order`` until the room is filled."""
    taken = [0] * len(lengths)
    for place in order:
        if not lengths[place]:
            continue
        room -= titles[place]
        taken[place] = max(min(lengths[place], room), 0)
        room -= taken[place]
        if taken[place] < lengths[place]:
            break
    return taken


def _ends(text: str, offsets: Sequence[Span], head: int, tail: int) -> str:
    if head + tail == len(offsets):
        return text
    return (text[: offsets[head - 1][1]] if head else "") + (text[offsets[-tail][0] :] if tail else "")
