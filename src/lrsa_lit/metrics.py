"""Scores of an answer against its references: token F1, exact match and recall, as pure functions.

F1 and exact match follow the SQuAD script as LongBench uses it (``qa_f1_score``): lower case, no punctuation, no
articles, single spaces. There, and so here, yes and no are words like any other: "yes, they were" has an F1 of 0.5
against "yes". (HotpotQA's own script gives 0 to every such answer that is not exactly yes or no.) Recall is
RULER's ``string_match``.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from typing import Literal, TypeAlias

Match: TypeAlias = Literal["any", "all"]

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)

__all__ = ["Match", "exact_match", "f1_score", "normalize_answer", "recall"]


def normalize_answer(text: str) -> str:
    """Lower case, without ASCII punctuation and articles, words separated by single spaces (SQuAD, LongBench)."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split())


def f1_score(prediction: str, answers: Sequence[str], match: Match = "any") -> float:
    """F1 of the normalised words, counted with repetition.

    Args:
        prediction: the generated text.
        answers: the references, at least one.
        match: ``"any"``: the answers are alternatives and the best one counts; ``"all"``: the answers are required
            together, and the reference is all of them joined by ", ".

    Returns:
        A score between 0 and 1; 0 where no word is shared, also if both sides normalise to nothing.
    """
    return max(_f1(normalize_answer(prediction).split(), words.split()) for words in _references(answers, match))


def exact_match(prediction: str, answers: Sequence[str], match: Match = "any") -> float:
    """1 if the normalised prediction equals a normalised reference, else 0; ``match`` as in :func:`f1_score`."""
    return float(normalize_answer(prediction) in _references(answers, match))


def recall(prediction: str, answers: Sequence[str], match: Match = "any") -> float:
    """Share of the answers that occur in the prediction, ignoring case (RULER's ``string_match``).

    With ``match="any"`` 1 if any answer occurs and 0 otherwise (``string_match_part``), with ``"all"`` the fraction
    of the answers that occur (``string_match_all``).
    """
    found = [answer.lower() in prediction.lower() for answer in answers]
    return float(any(found)) if match == "any" else sum(found) / len(found)


def _references(answers: Sequence[str], match: Match) -> list[str]:
    return [normalize_answer(answer) for answer in (answers if match == "any" else [", ".join(answers)])]


def _f1(predicted: list[str], expected: list[str]) -> float:
    shared = (Counter(predicted) & Counter(expected)).total()
    return 2 * shared / (len(predicted) + len(expected)) if shared else 0.0
