"""Sentences ranked by the words that they share with the question: a baseline without training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from lrsa_lit.bounds import check_setting, is_weight
from lrsa_lit.data.bm25 import bm25
from lrsa_lit.data.filters.sentence_filter import SentenceFilter
from lrsa_lit.data.filters.sentences import Sentence
from lrsa_lit.data.records import QARecord


@dataclass(frozen=True)
class BM25(SentenceFilter):
    """Keep the sentences with the highest BM25 scores; each is scored together with the title of its passage.

    Args:
        k1: term-frequency saturation; the larger it is, the more repetitions of a word add.
        b: length normalisation, from 0 (none) to 1 (full).
    """

    k1: float = field(default=1.5, kw_only=True)
    b: float = field(default=0.75, kw_only=True)
    asks: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Check the settings."""
        super().__post_init__()
        check_setting("k1", self.k1, is_weight(self.k1), "a number >= 0")
        check_setting("b", self.b, is_weight(self.b) and self.b <= 1, "a number from 0 to 1")

    def scores(self, record: QARecord, sentences: Sequence[Sentence]) -> list[float]:
        """The BM25 scores, with the sentences of the context as the corpus."""
        return bm25(record.question, [sentence.titled for sentence in sentences], self.k1, self.b)
