"""RULER's aggregation tasks: which words of a list, or of a coded text, are the most frequent?

The recipes, sizes and prompts are RULER's (``common_words_extraction``, ``freq_words_extraction``). Each task makes a
record of a given size; the answers do not depend on the size.
"""

from __future__ import annotations

import math
import random
import re
import string
from collections.abc import Callable, Sequence
from functools import cache
from itertools import islice

from lrsa_lit.data.prompts import Prompt
from lrsa_lit.data.records import Passage, QARecord
from lrsa_lit.data.sized import SizedTask
from lrsa_lit.paths import resolve

_WORDS = "package://wonderwords/assets/{}list.txt"
_KINDS = ("noun", "adjective", "verb", "profanity")
WORDS = tuple(map(_WORDS.format, _KINDS))
"""RULER's word lists; the last one lists the words to exclude."""

COMMON = 10
FREQUENT = 3

# Exponent and normalisation of the Zipf distribution that the coded words follow.
_ALPHA, _ZETA = 2.0, math.pi**2 / 6

_COMMON_INTRODUCTION = (
    "Below is a numbered list of words. In these words, some appear more often than others. "
    "Memorize the ones that appear most often."
)
_COMMON_QUESTION = f"What are the {COMMON} most common words in the above list?"
_COMMON_ANSWER = f"Answer: The top {COMMON} words that appear most often in the list are:"
COMMON_PROMPT = Prompt("{context}\nQuestion: {input}", answer=_COMMON_ANSWER)

_FREQUENT_QUESTION = (
    "Do not provide any explanation. Please ignore the dots '....'. "
    "What are the three most frequently appeared words in the above coded text?"
)
_FREQUENT_PROMPT = Prompt(
    "Read the following coded text and track the frequency of each coded word. "
    "Find the three most frequently appeared coded words. {context}\nQuestion: {input}",
    answer="Answer: According to the coded text above, the three most frequently appeared words are:",
)


def common_words(name: str, rng: random.Random, size: int, max_tokens: int, *, blank: str = " ") -> QARecord:
    """RULER's common words extraction: a solved example, then a list in which 10 words appear more often than others.

    The list has ``size`` other words; if the vocabulary is exhausted, pairs of its words are used. With 4,096
    ``max_tokens`` or more, common words appear 30 times and others 3 times; with fewer, 6 times and once. ``blank`` is
    the separator before the solved example's answer.
    """
    # Shorter contexts have fewer words and repetitions.
    long = max_tokens >= 4096
    others_shown, *shown = (30, 10, 3) if long else (10, 3, 1)
    vocabulary = words_of("noun", "adjective", "verb")
    words = iter(rng.sample(vocabulary, len(vocabulary)))
    example = list(islice(words, COMMON + others_shown))
    common = list(islice(words, COMMON))
    uncommon = list(islice(words, size))
    uncommon += _different(lambda: "-".join(rng.sample(vocabulary, 2)), size - len(uncommon))
    solved = _listed(_repeated(rng, example[:COMMON], example[COMMON:], *shown))
    listed = _listed(_repeated(rng, common, uncommon, *((30, 3) if long else (6, 1))))
    question = f"Question: {_COMMON_QUESTION} {_COMMON_ANSWER}{blank}{_listed(example[:COMMON])}"
    text = "\n".join([_COMMON_INTRODUCTION, solved, question, _COMMON_INTRODUCTION, listed])
    return QARecord(name, (Passage("", text),), _COMMON_QUESTION, tuple(common), match="all")


def frequent_words(name: str, rng: random.Random, size: int, max_tokens: int) -> QARecord:
    """RULER's frequent words extraction: coded words whose frequencies follow Zipf's law; the most frequent is noise.

    The vocabulary has ``max_tokens`` / 50 words. The text would have ``size`` words if the vocabulary were infinite.
    From a size of 80 on, the answers are unambiguous.
    """
    ranks = max(max_tokens // 50, FREQUENT + 2)
    ranked = ["...", *_different(lambda: "".join(rng.choices(string.ascii_lowercase, k=6)), ranks - 1)]
    words = [word for rank, word in enumerate(ranked, start=1) for _ in range(int(size * rank**-_ALPHA / _ZETA))]
    rng.shuffle(words)
    answers = tuple(ranked[1 : 1 + FREQUENT])
    return QARecord(name, (Passage("", " ".join(words)),), _FREQUENT_QUESTION, answers, match="all")


WORD_TASKS = {
    "common_words": SizedTask(common_words, COMMON, COMMON_PROMPT),
    "frequent_words": SizedTask(frequent_words, 80, _FREQUENT_PROMPT),
}


@cache
def words_of(*kinds: str) -> tuple[str, ...]:
    """The words of kinds ("noun", "adjective", "verb"): only letters, no profanity, sorted alphabetically."""
    listed = {kind: set(resolve(_WORDS.format(kind)).read_text(encoding="utf-8").split("\n")) for kind in _KINDS}
    words = set().union(*(listed[kind] for kind in kinds)) - listed["profanity"]
    return tuple(sorted(word for word in words if re.fullmatch("[a-z]+", word)))


def _different(draw: Callable[[], str], number: int) -> list[str]:
    found: dict[str, None] = {}
    while len(found) < number:
        found[draw()] = None
    return list(found)


def _repeated(rng: random.Random, common: Sequence[str], uncommon: Sequence[str], often: int, seldom: int) -> list[str]:
    words = [*common] * often + [*uncommon] * seldom
    rng.shuffle(words)
    return words


def _listed(words: Sequence[str]) -> str:
    return " ".join(f"{number}. {word}" for number, word in enumerate(words, start=1))
