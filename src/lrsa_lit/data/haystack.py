"""Contexts of any length: filler paragraphs from a pool around the relevant passages, up to a token budget."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import chain, islice
from typing import TYPE_CHECKING

from lrsa_lit.data.prompts import PROMPT, YES_NO, Example, Prompt, TooLong, encode, render_passage
from lrsa_lit.data.records import Passage, QARecord
from lrsa_lit.data.tokenization import token_counts
from lrsa_lit.evaluation.answer_scores import normalize_answer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Paragraphs are drawn and tokenised in groups of this size. The context is full when none of a group fits.
_DRAW = 32
# When tokens are counted, a passage's number in the context is still unknown; most have at most three digits.
_NUMBER = 999


class ParagraphPool:
    """Paragraphs that fill the contexts of a prompt; caches each paragraph's token count and words."""

    def __init__(self, passages: Sequence[Passage], prompt: Prompt = PROMPT) -> None:
        self.passages = passages
        self.prompt = prompt
        self._tokens: dict[int, int] = {}
        self._words: dict[int, str] = {}

    def under(self, prompt: Prompt) -> ParagraphPool:
        """The same paragraphs for another prompt that renders them identically; the caches are shared."""
        other = copy.copy(self)
        other.prompt = prompt
        return other

    def draw(self, rng: random.Random) -> Iterator[int]:
        """All positions of the pool in random order, without building the order up front."""
        seen: set[int] = set()
        while len(seen) < len(self.passages):
            position = rng.randrange(len(self.passages))
            if position not in seen:
                seen.add(position)
                yield position

    def mentions(self, position: int, answers: Sequence[str]) -> bool:
        """Whether a paragraph or its title contains an answer other than yes or no, as normalised whole words."""
        if position not in self._words:
            self._words[position] = f" {normalize_answer(render_passage(self.passages[position]))} "
        wanted = (normalize_answer(answer) for answer in answers)
        return any(words and words not in YES_NO and f" {words} " in self._words[position] for words in wanted)

    def tokens(self, positions: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """Tokens that each paragraph adds to a prompt; exact except for token merges across its borders."""
        new = [position for position in positions if position not in self._tokens]
        if new:
            texts = [self.prompt.between + self.prompt.passage(self.passages[position], _NUMBER) for position in new]
            self._tokens.update(zip(new, token_counts(tokenizer, texts), strict=True))
        return [self._tokens[position] for position in positions]

    def fill(
        self,
        record: QARecord,
        allowed: Callable[[int], bool],
        rng: random.Random,
        tokenizer: PreTrainedTokenizerBase,
        max_tokens: int,
        first: Sequence[int] = (),
    ) -> tuple[QARecord, Example | TooLong]:
        """Put a record's passages, in order, at random positions among paragraphs of the pool.

        Paragraphs at ``allowed`` positions of the pool are added while they fit into ``max_tokens``; some are removed
        again if the final prompt is too long. The positions ``first`` are added before any others, and then all
        paragraphs are shuffled.

        Returns:
            The filled record and its example, or :class:`TooLong` if the record's own passages exceed the budget.
        """
        example = encode(record, tokenizer, max_tokens, self.prompt)
        if isinstance(example, TooLong):
            return record, example
        room = max_tokens - len(example["input_ids"])
        chosen = self._choose(chain(first, filter(allowed, self.draw(rng))), room, tokenizer)
        while chosen:
            fillers = [self.passages[position] for position in (rng.sample(chosen, len(chosen)) if first else chosen)]
            full = replace(record, passages=interleave(record.passages, fillers, rng))
            found = encode(full, tokenizer, max_tokens, self.prompt)
            if not isinstance(found, TooLong):
                return full, found
            chosen.pop()
        return record, example

    def _choose(self, positions: Iterator[int], room: int, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        chosen: list[int] = []
        while drawn := list(islice(positions, _DRAW)):
            before = len(chosen)
            for position, cost in zip(drawn, self.tokens(drawn, tokenizer), strict=True):
                if cost <= room:
                    chosen.append(position)
                    room -= cost
            if len(chosen) == before:
                break
        return chosen


def interleave(kept: Sequence[Passage], fillers: Sequence[Passage], rng: random.Random) -> tuple[Passage, ...]:
    """Merge two sequences, each in its own order, with random positions for ``kept``."""
    places = set(rng.sample(range(len(kept) + len(fillers)), len(kept)))
    sources = {True: iter(kept), False: iter(fillers)}
    return tuple(next(sources[place in places]) for place in range(len(kept) + len(fillers)))
