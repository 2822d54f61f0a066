"""Splitting of a context into sentences: every character belongs to exactly one, so kept sentences can be joined."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lrsa_lit.data.records import Passage
from lrsa_lit.data.tokenization import encode_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_LINE = re.compile(r"[^\n]*\n*")


@dataclass(frozen=True)
class Sentence:
    """A sentence of a context, or a piece of a sentence that exceeds the budget.

    Attributes:
        passage: position of its passage in the context.
        title: title of its passage; may be empty.
        text: the text with the white space after it; the sentences of a passage join to the passage's text.
        first: whether it is the first sentence of its passage.
    """

    passage: int
    title: str
    text: str
    first: bool

    @property
    def titled(self) -> str:
        """The title of its passage followed by its text, as used for ranking."""
        return f"{self.title} {self.text}".strip()


def sentences_of(passages: Sequence[Passage]) -> list[Sentence]:
    """The sentences of a context, in order."""
    return [
        Sentence(place, passage.title, text, number == 0)
        for place, passage in enumerate(passages)
        for number, text in enumerate(split_sentences(passage.text))
    ]


def split_sentences(text: str) -> list[str]:
    """Split an English text into sentences; ``"".join`` restores the text.

    A line end ends a sentence. White space belongs to the sentence before it; leading white space belongs to the first
    sentence.
    """
    import sentencex

    found: list[str] = []
    for line in _LINE.findall(text):
        for part in sentencex.segment("en", line):
            if found and not (part.strip() and found[-1].strip()):
                found[-1] += part
            else:
                found.append(part)
    return found


def pieces_of(text: str, tokenizer: PreTrainedTokenizerBase, most: int) -> Iterator[str]:
    """Cut a text into pieces of at most ``most`` tokens, between words if possible.

    A word with more tokens is cut inside. Joined, the pieces give the text.
    """
    offsets = encode_text(tokenizer, text).offsets
    start = taken = 0
    while len(offsets) - taken > most:
        end = offsets[taken + most][0]
        blank = max(text.rfind(" ", start, end), text.rfind("\n", start, end)) + 1
        # A character that consists of several tokens is never cut.
        end = blank if text[start:blank].strip() else max(end, start + 1)
        yield text[start:end]
        start = end
        while taken < len(offsets) and offsets[taken][1] <= start:
            taken += 1
    if text[start:]:
        yield text[start:]
