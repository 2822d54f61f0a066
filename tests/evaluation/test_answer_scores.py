import math
import subprocess
import sys
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lrsa_lit.evaluation.answer_scores import exact_match, f1_score, normalize_answer, recall
from lrsa_lit.evaluation.answers import scores
from lrsa_lit.evaluation.qa_score import QAScore


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The  Eiffel Tower!", "eiffel tower"),
        ("a an the", ""),
        ("Theatre of an Era", "theatre of era"),
        ("U.S.A.", "usa"),
        ("3,677 seated", "3677 seated"),
        ("well-known\tfact\n", "wellknown fact"),
        ("«été»", "«été»"),
    ],
)
def test_normalize_answer(text: str, expected: str):
    assert normalize_answer(text) == expected


@pytest.mark.parametrize(
    ("prediction", "answers", "f1", "em"),
    [
        ("The Eiffel Tower.", ["eiffel tower"], 1.0, 1.0),
        ("in Paris", ["Paris"], 2 / 3, 0.0),
        ("Paris Paris", ["Paris"], 2 / 3, 0.0),
        ("London", ["Paris"], 0.0, 0.0),
        ("yes, they were", ["yes"], 0.5, 0.0),
        ("no", ["yes"], 0.0, 0.0),
        ("Yes.", ["yes"], 1.0, 1.0),
        ("", ["Paris"], 0.0, 0.0),
        ("1999", ["in 1999", "1999"], 1.0, 1.0),
        ("1999", ["1999", "in the summer of 1999"], 1.0, 1.0),
    ],
)
def test_f1_and_exact_match_take_the_best_of_alternatives(prediction: str, answers: list[str], f1: float, em: float):
    assert f1_score(prediction, answers) == pytest.approx(f1)
    assert exact_match(prediction, answers) == em


@pytest.mark.parametrize("answer", ["A", "a", "The", "An", "The The", "?", "...", "A."])
def test_an_answer_of_articles_or_punctuation_has_scores(answer: str):
    for right in (answer, answer.lower(), f" {answer}\n"):
        assert (f1_score(right, [answer]), exact_match(right, [answer])) == (1.0, 1.0)
    for wrong in ("", " ", "B", "!", "of"):
        assert (f1_score(wrong, [answer]), exact_match(wrong, [answer])) == (0.0, 0.0)


def test_a_letter_may_stand_in_a_sentence_and_with_a_full_stop():
    assert (f1_score("A.", ["A"]), exact_match("(A)", ["A"])) == (1.0, 1.0)
    assert f1_score("The answer is A", ["A"]) == pytest.approx(2 / 5)
    assert f1_score("the", ["A"]) == exact_match("the", ["A"]) == 0.0
    assert exact_match("the", ["A", "Paris"]) == exact_match("", ["A", "Paris"]) == 0.0
    assert exact_match("the Paris", ["A", "Paris"]) == 1.0


def test_every_required_answer_counts_even_one_that_is_an_article():
    assert (f1_score("A, B", ["A", "B"], "all"), exact_match("A, B", ["A", "B"], "all")) == (1.0, 1.0)
    assert (f1_score("B", ["A", "B"], "all"), exact_match("B", ["A", "B"], "all")) == (pytest.approx(2 / 3), 0.0)


@given(
    st.text("aAtheTHEnB .,?é", max_size=12),
    st.lists(st.text("aAtheTHEnB .,?é", min_size=1, max_size=12), min_size=1, max_size=3),
)
def test_whatever_is_left_of_every_answer_is_scored_as_longbench_does(prediction: str, answers: list[str]):
    words = normalize_answer(prediction).split()
    references = [normalize_answer(answer).split() for answer in answers]
    if all(references):
        shared = [(Counter(words) & Counter(reference)).total() for reference in references]
        lengths = [len(words) + len(reference) for reference in references]
        expected = max(2 * common / length for common, length in zip(shared, lengths, strict=True))
        assert f1_score(prediction, answers) == pytest.approx(expected)
        assert exact_match(prediction, answers) == (words in references)


def test_required_answers_form_one_reference():
    answers = ["1111111", "2222222"]
    assert exact_match("1111111, 2222222", answers, "all") == 1.0
    assert exact_match("1111111", answers, "all") == 0.0
    assert f1_score("1111111", answers, "all") == pytest.approx(2 / 3)
    assert f1_score("2222222 1111111", answers, "all") == 1.0


@pytest.mark.parametrize(
    ("prediction", "answers", "match", "expected"),
    [
        ("They are 11 and 33.", ["11", "22", "33", "44"], "all", 0.5),
        ("nothing", ["11"], "all", 0.0),
        ("It was PARIS, France", ["Lyon", "Paris"], "any", 1.0),
        ("Rome", ["Lyon", "Paris"], "any", 0.0),
        ("U.S.A", ["USA"], "any", 0.0),
    ],
)
def test_recall_is_rulers_string_match(prediction: str, answers: list[str], match: str, expected: float):
    assert recall(prediction, answers, match) == expected


def test_score_averages_over_updates():
    score = QAScore()
    score.update(3.0, 2, scores("in Paris", ("Paris",), "any"))
    score.update(1.0, 1, scores("11", ("11", "22"), "all"))
    score.update(1.0, 2, scores("x", ("y",), "any"))
    assert score.means(generated=True) == pytest.approx(
        {"loss": 5 / 5, "f1": (2 / 3 + 2 / 3) / 3, "em": 0.0, "recall": 1.5 / 3, "count": 3}
    )


def test_scores_of_processes_add_up():
    parts = [QAScore(), QAScore(), QAScore()]
    parts[0].update(1.0, 1, scores("Paris", ("Paris",), "any"))
    parts[0].update(1.0, 1, scores("Rome", ("Paris",), "any"))
    parts[2].update(4.0, 1, scores("Paris", ("Paris",), "any"))
    whole = QAScore.total(parts).means(generated=True)
    assert whole == pytest.approx({"loss": 2.0, "f1": 2 / 3, "em": 2 / 3, "recall": 2 / 3, "count": 3})


def test_losses_alone_and_parts_without_a_question():
    score = QAScore()
    score.update(3.0, 2, {})
    assert QAScore.total([QAScore(), score]).means(generated=False) == {"loss": 1.5, "count": 1}
    none = QAScore.total([QAScore(), QAScore()]).means(generated=True)
    assert none.pop("count") == 0
    assert none.keys() == {"loss", "f1", "em", "recall"}
    assert all(math.isnan(value) for value in none.values())


def test_the_functions_do_without_torch():
    code = "import sys, lrsa_lit.evaluation.answer_scores, lrsa_lit.data.prompts; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
