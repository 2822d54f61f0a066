"""Okapi BM25 (Robertson et al., 1994) over the texts of one context, computed by bm25s (Lù, arXiv 2407.03618)."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence

_WORD = re.compile(r"\w+")


def bm25(question: str, texts: Sequence[str], k1: float = 1.5, b: float = 0.75) -> list[float]:
    r"""BM25 score of each text for a question, with the texts as the whole corpus; 0 if they share no word.

    This is Lucene's variant, in which no term weight is negative.

    Args:
        question: the query; a repeated word counts each time.
        texts: the documents. Words are matches of ``\w+`` in lower case.
        k1: term-frequency saturation; the larger it is, the more repetitions of a word add.
        b: length normalisation, from 0 (none) to 1 (full).
    """
    import bm25s

    words, corpus = _words(question), list(map(_words, texts))
    wanted = [word for word in words if any(word in text for text in corpus)]
    if not wanted:
        return [0.0] * len(texts)
    logging.getLogger("bm25s").setLevel(logging.WARNING)
    index = bm25s.BM25(k1=k1, b=b, method="lucene", dtype="float64")
    index.index(corpus, show_progress=False)
    return [float(score) for score in index.get_scores(wanted)]


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())
