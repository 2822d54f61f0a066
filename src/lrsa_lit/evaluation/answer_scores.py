"""Scores of an answer against its references: token F1, exact match and recall, as pure functions.

F1 and exact match follow the SQuAD script as LongBench uses it (``qa_f1_score``): lower case, no punctuation, no
articles, single spaces. As in LongBench, yes and no are ordinary words: "yes, they were" has an F1 of 0.5 against
"yes". (HotpotQA's own script gives 0 to every such answer that is not exactly yes or no.) Recall is RULER's
``string_match``.

This project differs from LongBench in one case. If normalisation leaves nothing of a reference answer, such as "A" or
"?", articles and, if necessary, punctuation are kept in the comparison. LongBench then gives an F1 of 0 for every
prediction, and an exact match of 1 for every prediction that normalisation also leaves empty.
"""

from __future__ import annotations

import difflib
import re
import string
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Literal, TypeAlias

Match: TypeAlias = Literal["any", "all", "verbatim"]

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize_answer(text: str) -> str:
    """Lower-case a text, remove ASCII punctuation and articles, and collapse white space (SQuAD, LongBench)."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split())


def f1_score(prediction: str, answers: Sequence[str], match: Match = "any") -> float:
    """F1 in [0, 1] of the normalised words, counted with repetition.

    ``match="any"``: the answers, at least one, are alternatives, and the best one counts. ``"all"``: the reference is
    all answers joined by ", ". ``"verbatim"``: there is one answer, and the score is :func:`verbatim_score`.
    """
    if match == "verbatim":
        return verbatim_score(prediction, answers[0])
    pairs = _compared(prediction, answers, match)
    return max(_f1(predicted.split(), expected.split()) for predicted, expected in pairs)


def verbatim_score(prediction: str, answer: str) -> float:
    """How much of a text is repeated, in [0, 1]; 0 unless the prediction starts with the answer's first word.

    For the text after that word, the score is the ratio 2 M / T of Python's ``difflib``, an F1 over characters: M
    characters match in order, and both texts have T characters together. OpenAI's MRCR is scored in this way, except
    that difflib's heuristic for texts of 200 characters or more (``autojunk``) is off here.
    """
    word, _, text = answer.strip().partition(" ")
    said = prediction.strip()
    if not said.startswith(word):
        return 0.0
    return difflib.SequenceMatcher(None, said.removeprefix(word).strip(), text.strip(), autojunk=False).ratio()


def exact_match(prediction: str, answers: Sequence[str], match: Match = "any") -> float:
    """1 if the normalised prediction equals a normalised reference, else 0; ``match`` as in :func:`f1_score`."""
    return float(any(predicted == expected for predicted, expected in _compared(prediction, answers, match)))


def recall(prediction: str, answers: Sequence[str], match: Match = "any") -> float:
    """Share of the answers that occur in the prediction, ignoring case (RULER's ``string_match``).

    With ``match="any"``, 1 if any answer occurs and 0 otherwise (``string_match_part``); otherwise the fraction of the
    answers that occur (``string_match_all``).
    """
    found = [answer.lower() in prediction.lower() for answer in answers]
    return float(any(found)) if match == "any" else sum(found) / len(found)


def _compared(prediction: str, answers: Sequence[str], match: Match) -> Iterator[tuple[str, str]]:
    """Pairs of prediction and reference, normalised as far as possible without making a reference answer empty."""
    for reference in [[answer] for answer in answers] if match == "any" else [answers]:
        form = next((form for form in _FORMS if all(map(form, reference))), _spaced)
        yield form(prediction), form(", ".join(reference))


def _with_articles(text: str) -> str:
    return _spaced(text.translate(_NO_PUNCTUATION))


def _spaced(text: str) -> str:
    return " ".join(text.lower().split())


_FORMS = (normalize_answer, _with_articles)


def _f1(predicted: list[str], expected: list[str]) -> float:
    shared = (Counter(predicted) & Counter(expected)).total()
    return 2 * shared / (len(predicted) + len(expected)) if shared else 0.0
