"""Rewritings of a passage that copy from it, which any writer has to beat."""

from __future__ import annotations

from lrsa_lit.data.filters.pos_priority import allocated, chunk_scores, kept_words
from lrsa_lit.data.filters.sentences import split_sentences
from lrsa_lit.data.filters.word_tags import tagged


def extracts(text: str) -> dict[str, str]:
    """The first sentence of a text, the half of its words that matters most, and all of it, by what they are called."""
    sentences = split_sentences(text)
    return {"lead": sentences[0].strip() if sentences else "", "half": _half(sentences), "whole": text}


def _half(sentences: list[str]) -> str:
    """Half of the words by their parts of speech, sentence by sentence (:mod:`lrsa_lit.data.filters.pos_priority`)."""
    chunks = [words for words in map(tagged, sentences) if words]
    lengths = list(map(len, chunks))
    counts = allocated(lengths, chunk_scores(chunks), (sum(lengths) + 1) // 2)
    kept = (chunk[place] for chunk, count in zip(chunks, counts, strict=True) for place in kept_words(chunk, count))
    return " ".join(word.text for word in kept)
