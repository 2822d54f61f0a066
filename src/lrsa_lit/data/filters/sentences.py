"""Sentences of a context: every character of it belongs to exactly one, so that those that are kept can be joined."""

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
    """A sentence of a context, or a piece of one that is longer than all that may stay.

    Attributes:
        passage: the position of its passage in the context.
        title: of its passage; may be empty.
        text: with the white space behind it; those of a passage together are the passage's text.
        first: whether it is the first of its passage.
    """

    passage: int
    title: str
    text: str
    first: bool

    @property
    def titled(self) -> str:
        """What ranks it: its text behind the title of its passage."""
        return f"{self.title} {self.text}".strip()


def sentences_of(passages: Sequence[Passage]) -> list[Sentence]:
    """The sentences of a context in their order."""
    return [
        Sentence(place, passage.title, text, number == 0)
        for place, passage in enumerate(passages)
        for number, text in enumerate(split_sentences(passage.text))
    ]


def split_sentences(text: str) -> list[str]:
    """The sentences of an English text: ``"".join`` of them gives the text.

    A line end closes a sentence. White space stays with the sentence before it, at the beginning with the first one.
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
    """A text in pieces of at most so many tokens each, cut between words where that is possible.

    A word that has more tokens is cut within. Joined, the pieces are the text.
    """
    offsets = encode_text(tokenizer, text).offsets
    start = taken = 0
    while len(offsets) - taken > most:
        end = offsets[taken + most][0]
        blank = max(text.rfind(" ", start, end), text.rfind("\n", start, end)) + 1
        # A character of several tokens is never cut.
        end = blank if text[start:blank].strip() else max(end, start + 1)
        yield text[start:end]
        start = end
        while taken < len(offsets) and offsets[taken][1] <= start:
            taken += 1
    if text[start:]:
        yield text[start:]
