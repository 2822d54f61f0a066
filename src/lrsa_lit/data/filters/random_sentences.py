"""Random sentences: the baseline that every filter must beat at equal budget."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from lrsa_lit.data.filters.sentence_filter import SentenceFilter
from lrsa_lit.data.filters.sentences import Sentence
from lrsa_lit.data.records import QARecord


@dataclass(frozen=True)
class RandomSentences(SentenceFilter):
    """Keep random sentences; the seed and the record's id decide which.

    Args:
        seed: seed of the random choice.
    """

    seed: int = 0

    def scores(self, record: QARecord, sentences: Sequence[Sentence]) -> list[float]:
        """Random numbers from 0 to 1."""
        rng = random.Random(f"{self.seed}:{record.id}")
        return [rng.random() for _ in sentences]
