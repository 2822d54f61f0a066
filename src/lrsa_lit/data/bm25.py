"""Okapi BM25 (Robertson et al., 1994) over the texts of one context, by bm25s (Lù, arXiv 2407.03618)."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence

_WORD = re.compile(r"\w+")


def bm25(question: str, texts: Sequence[str], k1: float = 1.5, b: float = 0.75) -> list[float]:
    """How well each text, which counts alone among these, matches a question; 0 without a word in common.

    The form is Lucene's, in which no word weighs less than nothing.

    Args:
        question: its words are looked for, each as often as it is there.
        texts: a word of theirs is a run of letters and digits, in lower case.
        k1: from which count on a word that comes again adds little.
        b: how much long texts are at a disadvantage, from 0 to 1.
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
