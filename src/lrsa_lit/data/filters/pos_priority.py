"""POS-priority chunks, after LanguaShrink (arXiv 2409.00855): drop words that readers skip.

LanguaShrink weights words by part of speech and chunks by meaning and position, and distils a small model that writes
the shortened text. Its tables and model are not public. The weights and the allocation here are this project's own, and
no model is trained.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from lrsa_lit.bounds import check_setting, is_integer, is_weight
from lrsa_lit.data.filters.context_filter import Budgeted, with_texts
from lrsa_lit.data.filters.sentences import sentences_of
from lrsa_lit.data.filters.word_tags import Word, check_english, tagged
from lrsa_lit.data.prompts import Prompt
from lrsa_lit.data.records import QARecord
from lrsa_lit.errors import UserError

PRIORITY = {"PROPN": 1.0, "NUM": 1.0, "NOUN": 0.9, "VERB": 0.8, "ADJ": 0.6, "ADV": 0.5, "X": 0.5, "SYM": 0.5} | {
    "PRON": 0.4, "ADP": 0.3, "AUX": 0.2, "CCONJ": 0.2, "SCONJ": 0.2, "PART": 0.2, "DET": 0.1, "INTJ": 0.1, "PUNCT": 0.0
}  # fmt: skip
NEGATIONS = frozenset({"not", "n't", "no", "never", "none", "nor", "neither", "without"})


class Placed(NamedTuple):
    """A word of a context and the position of its passage."""

    passage: int
    word: Word


@dataclass(frozen=True)
class POSPriorityChunks(Budgeted):
    """Keep the highest-priority words of each chunk, joined by spaces, whatever the question.

    A chunk keeps more words the higher their priority and the nearer it is to either end of the context. Texts must be
    English. The tagger needs the package textblob.

    Args:
        chunk_words: sentences are merged into chunks of at most this many words; null makes each sentence a chunk.
        density: weight of the mean word priority in a chunk's score; its position has the weight 1 - density.
    """

    chunk_words: int | None = field(default=None, kw_only=True)
    density: float = field(default=0.7, kw_only=True)

    def __post_init__(self) -> None:
        """Check the settings, and that the tagger is installed."""
        super().__post_init__()
        count = self.chunk_words is None or (is_integer(self.chunk_words) and self.chunk_words >= 1)
        check_setting("chunk_words", self.chunk_words, count, "an integer >= 1, or null for sentences")
        share = is_weight(self.density) and self.density <= 1
        check_setting("density", self.density, share, "a number from 0 to 1")
        if importlib.util.find_spec("textblob") is None:
            reason = "needs textblob, which is not installed"
            raise UserError("filter", type(self).__name__, reason=reason, hint="pip install 'lrsa-lit[tagger]'")

    def shorten(self, record: QARecord, prompt: Prompt) -> Sequence[str]:
        """The kept words of each passage: as many as fit into the budget, found by bisection."""
        total = self.count(record.passages, prompt)
        if (budget := self.budget(total, record, prompt)) >= total:
            return [passage.text for passage in record.passages]
        check_english(record)
        chunks = self._chunks(record)
        scores = chunk_scores([[placed.word for placed in chunk] for chunk in chunks], self.density)

        def left(words: int) -> list[str]:
            texts = [""] * len(record.passages)
            for passage, word in _stay(chunks, scores, words):
                texts[passage] += f" {word.text}" if texts[passage] else word.text
            return texts

        fitting, exceeding = 0, sum(map(len, chunks)) + 1
        while exceeding - fitting > 1:
            middle = (fitting + exceeding) // 2
            if self.count(with_texts(record.passages, left(middle)), prompt) <= budget:
                fitting = middle
            else:
                exceeding = middle
        return left(fitting)

    def _chunks(self, record: QARecord) -> list[list[Placed]]:
        """The words of each chunk: one sentence, or several if ``chunk_words`` allows."""
        found: list[list[Placed]] = []
        for sentence in sentences_of(record.passages):
            words = [Placed(sentence.passage, word) for word in tagged(sentence.text)]
            if found and self.chunk_words is not None and len(found[-1]) + len(words) <= self.chunk_words:
                found[-1] += words
            elif words:
                found.append(words)
        return found


def priority(word: Word) -> float:
    """The priority of a word, from 0 to 1."""
    return 1.0 if word.text.lower() in NEGATIONS else PRIORITY[word.tag]


def chunk_scores(chunks: Sequence[Sequence[Word]], density: float = 0.7) -> list[float]:
    """Score of each chunk: the mean priority of its words, without punctuation, combined with its position.

    The position term decays exponentially from both ends of the context, after Ebbinghaus' forgetting curve; its time
    constant is a third of the number of chunks.
    """
    count = len(chunks)
    tau = max(1.0, count / 3)
    found = []
    for place, chunk in enumerate(chunks):
        matter = [priority(word) for word in chunk if word.tag != "PUNCT"]
        mean = sum(matter) / len(matter) if matter else 0.0
        retention = max(math.exp(-place / tau), math.exp(-(count - 1 - place) / tau))
        found.append(density * mean + (1 - density) * retention)
    return found


def allocated(lengths: Sequence[int], scores: Sequence[float], words: int) -> list[int]:
    """Distribute ``words`` words over the chunks.

    Shares are proportional to length times score, at most the length; what exceeds a length is distributed again.
    Shares are rounded by the largest-remainder method; ties go to the earlier chunk.
    """
    weights = [length * score for length, score in zip(lengths, scores, strict=True)]
    share, left = [0.0] * len(lengths), float(min(words, sum(lengths)))
    waiting = set(range(len(lengths)))
    while waiting and (total := sum(weights[place] for place in sorted(waiting))) > 0:
        full = [place for place in sorted(waiting) if left * weights[place] / total >= lengths[place]]
        if not full:
            share = [left * weights[each] / total if each in waiting else share[each] for each in range(len(lengths))]
            break
        for place in full:
            share[place] = float(lengths[place])
            left -= lengths[place]
            waiting.remove(place)
    # The small term corrects rounding: 2.9999999999999996 is 3.
    count = [min(int(value + 1e-9), length) for value, length in zip(share, lengths, strict=True)]
    by_remainder = sorted(range(len(lengths)), key=lambda place: (count[place] - share[place], place))
    missing = min(words, sum(lengths)) - sum(count)
    while missing > 0:
        for place in by_remainder:
            if missing > 0 and count[place] < lengths[place]:
                count[place] += 1
                missing -= 1
    return count


def kept_words(chunk: Sequence[Word], count: int) -> list[int]:
    """Positions of the ``count`` words with the highest priority, ascending; ties go to the earlier word."""
    return sorted(sorted(range(len(chunk)), key=lambda place: (-priority(chunk[place]), place))[:count])


def _stay(chunks: Sequence[Sequence[Placed]], scores: Sequence[float], words: int) -> Iterator[Placed]:
    """Yield the kept words, ``words`` in total, in order."""
    counts = allocated(list(map(len, chunks)), scores, words)
    for chunk, count in zip(chunks, counts, strict=True):
        for place in kept_words([placed.word for placed in chunk], count):
            yield chunk[place]
