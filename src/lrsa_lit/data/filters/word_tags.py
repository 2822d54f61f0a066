"""Words of English text with universal part-of-speech tags (Nivre et al., 2016), by textblob's tagger.

It is a lexicon and rules (pattern.en), which come in textblob's package, so nothing is downloaded.
"""

from __future__ import annotations

from typing import NamedTuple

from lrsa_lit.data.records import QARecord
from lrsa_lit.errors import UserError

# Of the Penn Treebank's tags, without what VB, NN and others end with.
_UNIVERSAL = {
    "CC": "CCONJ", "CD": "NUM", "DT": "DET", "EX": "PRON", "FW": "X", "IN": "ADP", "JJ": "ADJ", "LS": "X", "MD": "AUX",
    "NN": "NOUN", "NNP": "PROPN", "PDT": "DET", "POS": "PART", "PRP": "PRON", "RB": "ADV", "RP": "ADP", "SYM": "SYM",
    "TO": "PART", "UH": "INTJ", "VB": "VERB", "WDT": "DET", "WP": "PRON", "WRB": "ADV", "$": "SYM", "#": "SYM",
}  # fmt: skip
_FORMS_OF_BE = frozenset({"am", "are", "be", "been", "being", "is", "was", "were"})
_LAST_LATIN = "\N{LATIN SMALL LETTER Y WITH STROKE}"


class Word(NamedTuple):
    """A word and its universal tag."""

    text: str
    tag: str


def tagged(text: str) -> list[Word]:
    """The words of an English text, marks of punctuation among them."""
    from textblob.taggers import PatternTagger

    words: list[Word] = []
    for word, tag in PatternTagger().tag(text, tokenize=True):
        # The tokenizer takes "n't" apart.
        if word == "t" and [each.text for each in words[-2:]] == ["n", "'"]:
            words[-2:] = [Word("n't", "PART")]
        else:
            words.append(Word(word, _universal(word, tag)))
    return words


def check_english(record: QARecord) -> None:
    """Refuse a context of which most letters are not Latin; a UserError names the record."""
    letters = [char for passage in record.passages for char in passage.text if char.isalpha()]
    if sum(char > _LAST_LATIN for char in letters) * 2 > len(letters):
        reason = f"tags English words, and record {record.id!r} is in another script"
        raise UserError("filter", reason=reason, hint="use BM25, RandomSentences or Truncate")


def _universal(word: str, tag: str) -> str:
    if "://" in word:
        return "X"
    if not any(char.isalnum() for char in word):
        return "SYM" if tag in ("$", "#", "SYM") else "PUNCT"
    if word.lower() in _FORMS_OF_BE:
        return "AUX"
    if word[0].isdigit():
        return "NUM"
    # NNPS, NNS, VBZ, JJR, PRP$ …
    stems = (tag[:length] for length in range(len(tag), 0, -1))
    return next((_UNIVERSAL[stem] for stem in stems if stem in _UNIVERSAL), "X")
