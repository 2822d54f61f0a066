import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lrsa_lit.data.bm25 import bm25

TEXT = st.lists(st.sampled_from(["a", "b", "c", "d"]), max_size=6).map(" ".join)


def by_hand(question, texts, k1, b):
    """Lucene's form, in loops."""
    texts = [text.split() for text in texts]
    mean = sum(map(len, texts)) / len(texts)
    found = []
    for text in texts:
        total = 0.0
        for word in question.split():
            holding = sum(word in other for other in texts)
            weight, times = math.log(1 + (len(texts) - holding + 0.5) / (holding + 0.5)), text.count(word)
            total += weight * times / (times + k1 * (1 - b + b * len(text) / mean)) if times else 0.0
        found.append(total)
    return found


@given(TEXT, st.lists(TEXT, min_size=1, max_size=5), st.floats(0.1, 3), st.floats(0, 1))
def test_scores_are_those_of_the_formula(question, texts, k1, b):
    assert bm25(question, texts, k1, b) == pytest.approx(
        by_hand(question, texts, k1, b) if any(texts) else [0.0] * len(texts), abs=1e-9
    )


def test_case_and_punctuation_do_not_matter():
    first, second = bm25("Who founded Isk?", ["FOUNDED: isk!", "nothing here"])
    assert first > 0 == second


def test_nothing_in_common_is_nothing():
    assert bm25("日", ["a", ""]) == [0.0, 0.0]
    assert bm25("a", []) == []
