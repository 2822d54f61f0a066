"""Extractive rewritings of a passage: baselines that every writer must beat."""

from __future__ import annotations

from lrsa_lit.data.filters.pos_priority import allocated, chunk_scores, kept_words
from lrsa_lit.data.filters.sentences import split_sentences
from lrsa_lit.data.filters.word_tags import tagged


def extracts(text: str) -> dict[str, str]:
    """Extracts by name: the first sentence ("lead"), the most important half of the words, and the whole text."""
    sentences = split_sentences(text)
    return {"lead": sentences[0].strip() if sentences else "", "half": _half(sentences), "whole": text}


def _half(sentences: list[str]) -> str:
    """Half of the words, chosen by part of speech per sentence (:mod:`lrsa_lit.data.filters.pos_priority`)."""
    chunks = [words for words in map(tagged, sentences) if words]
    lengths = list(map(len, chunks))
    counts = allocated(lengths, chunk_scores(chunks), (sum(lengths) + 1) // 2)
    kept = (chunk[place] for chunk, count in zip(chunks, counts, strict=True) for place in kept_words(chunk, count))
    return " ".join(word.text for word in kept)
