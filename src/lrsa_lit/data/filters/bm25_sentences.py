"""Sentences by the words that they share with the question: a control that needs no training."""

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
    """Keep the sentences of the highest BM25 score, each ranked behind the title of its passage.

    Args:
        k1: from which count on a word that comes again adds little.
        b: how much long sentences are at a disadvantage, from 0 to 1.
    """

    k1: float = field(default=1.5, kw_only=True)
    b: float = field(default=0.75, kw_only=True)
    asks: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Check each bound once."""
        super().__post_init__()
        check_setting("k1", self.k1, is_weight(self.k1), "a number >= 0")
        check_setting("b", self.b, is_weight(self.b) and self.b <= 1, "a number from 0 to 1")

    def scores(self, record: QARecord, sentences: Sequence[Sentence]) -> list[float]:
        """Those of BM25, where the sentences of the context are all texts there are."""
        return bm25(record.question, [sentence.titled for sentence in sentences], self.k1, self.b)
