"""Sentences at random: what any filter must beat at its budget."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from lrsa_lit.data.filters.sentence_filter import SentenceFilter
from lrsa_lit.data.filters.sentences import Sentence
from lrsa_lit.data.records import QARecord


@dataclass(frozen=True)
class RandomSentences(SentenceFilter):
    """Keep sentences at random, decided by the seed and the record's id.

    Args:
        seed: another one keeps others.
    """

    seed: int = 0

    def scores(self, record: QARecord, sentences: Sequence[Sentence]) -> list[float]:
        """Drawn from 0 to 1."""
        rng = random.Random(f"{self.seed}:{record.id}")
        return [rng.random() for _ in sentences]
