"""RULER's aggregation tasks: which words of a list, or of a coded text, are the most frequent?

The recipes, sizes and prompts are RULER's (``common_words_extraction``, ``freq_words_extraction``). Each task makes a
record of a given size, and :func:`largest` finds the size that fills a budget; the answers do not depend on the size.
"""

from __future__ import annotations

import math
import random
import re
import string
from collections.abc import Callable, Sequence
from functools import cache
from itertools import count, islice
from typing import TYPE_CHECKING

from lrsa_lit.data.prompts import Example, Prompt, TooLong, encode
from lrsa_lit.data.records import Passage, QARecord
from lrsa_lit.paths import resolve

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

WORDS = tuple(f"package://wonderwords/assets/{kind}list.txt" for kind in ("noun", "adjective", "verb", "profanity"))
"""RULER's source of words, the last file being of those to leave out."""

COMMON = 10
FREQUENT = 3
ALPHA = 2.0
"""Exponent of the Zipf distribution that the coded words follow."""

# A context of fewer tokens has less of everything.
_LONG = 4096
_NOISE = "..."
_CODE_LETTERS = 6
_TOKENS_A_CODE = 50
_ZETA = math.pi**2 / 6

_COMMON_INTRODUCTION = (
    "Below is a numbered list of words. In these words, some appear more often than others. "
    "Memorize the ones that appear most often."
)
_COMMON_QUESTION = f"What are the {COMMON} most common words in the above list?"
_COMMON_ANSWER = f"Answer: The top {COMMON} words that appear most often in the list are:"
_COMMON_PROMPT = Prompt("{context}\nQuestion: {input}", answer=_COMMON_ANSWER)

_FREQUENT_QUESTION = (
    "Do not provide any explanation. Please ignore the dots '....'. "
    "What are the three most frequently appeared words in the above coded text?"
)
_FREQUENT_PROMPT = Prompt(
    "Read the following coded text and track the frequency of each coded word. "
    "Find the three most frequently appeared coded words. {context}\nQuestion: {input}",
    answer="Answer: According to the coded text above, the three most frequently appeared words are:",
)

Make = Callable[[str, random.Random, int, int], QARecord]
"""A record from its id, what draws it, its size and the budget in tokens."""


def common_words(name: str, rng: random.Random, size: int, max_tokens: int) -> QARecord:
    """RULER's common words extraction: a solved example, then a list in which 10 words appear more often than others.

    Args:
        name: the record's id.
        rng: draws everything.
        size: how many uncommon words there are; those beyond the vocabulary are pairs of its words.
        max_tokens: from 4,096 on common words appear 30 times and others 3 times, below 6 times and once.
    """
    long = max_tokens >= _LONG
    others_shown, *shown = (30, 10, 3) if long else (10, 3, 1)
    vocabulary = _vocabulary()
    words = iter(rng.sample(vocabulary, len(vocabulary)))
    example = list(islice(words, COMMON + others_shown))
    common = list(islice(words, COMMON))
    uncommon = list(islice(words, size))
    uncommon += _pairs(rng, vocabulary, size - len(uncommon))
    solved = _listed(_repeated(rng, example[:COMMON], example[COMMON:], *shown))
    listed = _listed(_repeated(rng, common, uncommon, *((30, 3) if long else (6, 1))))
    text = "\n".join(
        [
            _COMMON_INTRODUCTION,
            solved,
            f"Question: {_COMMON_QUESTION} {_COMMON_ANSWER} {_listed(example[:COMMON])}",
            _COMMON_INTRODUCTION,
            listed,
        ]
    )
    return QARecord(name, (Passage("", text),), _COMMON_QUESTION, tuple(common), match="all")


def frequent_words(name: str, rng: random.Random, size: int, max_tokens: int) -> QARecord:
    """RULER's frequent words extraction: coded words whose frequencies follow Zipf's law; the most frequent is noise.

    Args:
        name: the record's id.
        rng: draws everything.
        size: how many words there would be if the vocabulary were infinite; from 80 on the answers are unambiguous.
        max_tokens: a fiftieth of it is the size of the vocabulary.
    """
    ranks = max(max_tokens // _TOKENS_A_CODE, FREQUENT + 2)
    codes: dict[str, None] = {}
    while len(codes) < ranks - 1:
        codes["".join(rng.choices(string.ascii_lowercase, k=_CODE_LETTERS))] = None
    ranked = [_NOISE, *codes]
    words = [word for rank, word in enumerate(ranked, start=1) for _ in range(int(size * rank**-ALPHA / _ZETA))]
    rng.shuffle(words)
    answers = tuple(ranked[1 : 1 + FREQUENT])
    return QARecord(name, (Passage("", " ".join(words)),), _FREQUENT_QUESTION, answers, match="all")


WORD_TASKS: dict[str, tuple[Make, int, Prompt]] = {
    "common_words": (common_words, COMMON, _COMMON_PROMPT),
    "frequent_words": (frequent_words, 80, _FREQUENT_PROMPT),
}
"""How a task's record is made, its smallest size, and how its question is put."""


def largest(
    make: Callable[[int], QARecord],
    smallest: int,
    prompt: Prompt,
    tokenizer: PreTrainedTokenizerBase,
    max_tokens: int,
) -> Example | TooLong:
    """The example of the largest record that fits the budget.

    Args:
        make: a record of a size; a larger one has no fewer tokens.
        smallest: size to start from.
        prompt: how the question is put.
        tokenizer: as for :func:`~lrsa_lit.data.prompts.encode`.
        max_tokens: budget of prompt and answer together.

    Returns:
        The example, or :class:`TooLong` if even the smallest record exceeds the budget.
    """
    size, found = smallest, encode(make(smallest), tokenizer, max_tokens, prompt)
    if isinstance(found, TooLong):
        return found
    limit = math.inf
    per_step = len(found["input_ids"]) / size
    while True:
        length = len(found["input_ids"])
        trial = int(min(size + max((max_tokens - length) // per_step, 1), limit - 1))
        if trial <= size:
            return found
        larger = encode(make(trial), tokenizer, max_tokens, prompt)
        # Records grow evenly but for the last tokens, so a few trials suffice.
        tokens = larger.tokens if isinstance(larger, TooLong) else len(larger["input_ids"])
        per_step = max((tokens - length) / (trial - size), 0.1)
        if isinstance(larger, TooLong):
            limit = trial
        else:
            size, found = trial, larger


@cache
def _vocabulary() -> tuple[str, ...]:
    nouns, adjectives, verbs, profane = (resolve(source).read_text(encoding="utf-8").split("\n") for source in WORDS)
    words = {*nouns, *adjectives, *verbs} - set(profane)
    return tuple(sorted(word for word in words if re.fullmatch("[a-z]+", word)))


def _pairs(rng: random.Random, words: Sequence[str], number: int) -> list[str]:
    pairs: dict[str, None] = {}
    while len(pairs) < number:
        pairs["-".join(rng.sample(words, 2))] = None
    return list(pairs)


def _repeated(rng: random.Random, common: Sequence[str], uncommon: Sequence[str], often: int, seldom: int) -> list[str]:
    words = [*common] * often + [*uncommon] * seldom
    rng.shuffle(words)
    return words


def _listed(words: Sequence[str]) -> str:
    return " ".join(f"{number}. {word}" for number, word in zip(count(1), words, strict=False))
