"""Universal part-of-speech tags (Nivre et al., 2016) for English text, by textblob's tagger.

The tagger (pattern.en) uses a lexicon and rules that are part of textblob's package, so nothing is downloaded.
"""

from __future__ import annotations

from typing import NamedTuple

from lrsa_lit.data.records import QARecord
from lrsa_lit.errors import UserError

# Keys are Penn Treebank tags; suffixes such as VBZ's Z are cut off before the lookup.
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
    """The words and punctuation marks of an English text, with their tags."""
    from textblob.taggers import PatternTagger

    words: list[Word] = []
    for word, tag in PatternTagger().tag(text, tokenize=True):
        # The tokenizer splits "n't" into three tokens.
        if word == "t" and [each.text for each in words[-2:]] == ["n", "'"]:
            words[-2:] = [Word("n't", "PART")]
        else:
            words.append(Word(word, _universal(word, tag)))
    return words


def check_english(record: QARecord) -> None:
    """Raise a UserError if most letters of a record's context are not Latin."""
    letters = [char for passage in record.passages for char in passage.text if char.isalpha()]
    if sum(char > _LAST_LATIN for char in letters) * 2 > len(letters):
        reason = f"tags English words, but record {record.id!r} is in another script"
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
