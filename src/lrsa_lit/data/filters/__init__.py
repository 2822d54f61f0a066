"""Filters that shorten a context before the model sees it; the setting ``filter`` of a data set selects one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lrsa_lit.lazy import lazily

if TYPE_CHECKING:
    from lrsa_lit.data.filters.bm25_sentences import BM25 as BM25
    from lrsa_lit.data.filters.context_filter import Budgeted as Budgeted
    from lrsa_lit.data.filters.context_filter import ContextFilter as ContextFilter
    from lrsa_lit.data.filters.context_filter import Filtered as Filtered
    from lrsa_lit.data.filters.cpc import CPC as CPC
    from lrsa_lit.data.filters.pos_priority import POSPriorityChunks as POSPriorityChunks
    from lrsa_lit.data.filters.random_sentences import RandomSentences as RandomSentences
    from lrsa_lit.data.filters.sentence_filter import SentenceFilter as SentenceFilter
    from lrsa_lit.data.filters.sentences import Sentence as Sentence
    from lrsa_lit.data.filters.summaries import Summaries as Summaries
    from lrsa_lit.data.filters.truncate import Truncate as Truncate

_HOMES = {
    "BM25": "bm25_sentences",
    "CPC": "cpc",
    "Budgeted": "context_filter",
    "ContextFilter": "context_filter",
    "Filtered": "context_filter",
    "POSPriorityChunks": "pos_priority",
    "RandomSentences": "random_sentences",
    "Sentence": "sentences",
    "SentenceFilter": "sentence_filter",
    "Summaries": "summaries",
    "Truncate": "truncate",
}
__all__ = list(_HOMES)
__getattr__ = lazily(__name__, {name: f"{__name__}.{module}" for name, module in _HOMES.items()})
