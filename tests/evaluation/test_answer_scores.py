import math
from collections import Counter

import pytest
from helpers import modules_after
from hypothesis import given
from hypothesis import strategies as st

from lrsa_lit.evaluation.answer_scores import exact_match, f1_score, normalize_answer, recall, verbatim_score
from lrsa_lit.evaluation.answers import means, scores


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
def test_normalize_answer(text, expected):
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
        # A letter may stand in a sentence and with a full stop.
        ("A.", ["A"], 1.0, 1.0),
        ("(A)", ["A"], 1.0, 1.0),
        ("The answer is A", ["A"], 2 / 5, 0.0),
        ("the", ["A", "Paris"], 0.0, 0.0),
        ("the Paris", ["A", "Paris"], 1.0, 1.0),
    ],
)
def test_f1_and_exact_match_take_the_best_of_alternatives(prediction, answers, f1, em):
    assert f1_score(prediction, answers) == pytest.approx(f1)
    assert exact_match(prediction, answers) == em


@pytest.mark.parametrize("answer", ["A", "a", "The", "An", "The The", "?", "...", "A."])
def test_an_answer_of_articles_or_punctuation_has_scores(answer):
    for right in (answer, answer.lower(), f" {answer}\n"):
        assert (f1_score(right, [answer]), exact_match(right, [answer])) == (1.0, 1.0)
    for wrong in ("", " ", "B", "!", "of"):
        assert (f1_score(wrong, [answer]), exact_match(wrong, [answer])) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("prediction", "answers", "f1", "em"),
    [
        ("A, B", ["A", "B"], 1.0, 1.0),
        ("B", ["A", "B"], 2 / 3, 0.0),
        ("1111111, 2222222", ["1111111", "2222222"], 1.0, 1.0),
        ("2222222 1111111", ["1111111", "2222222"], 1.0, 0.0),
    ],
)
def test_required_answers_form_one_reference(prediction, answers, f1, em):
    assert f1_score(prediction, answers, "all") == pytest.approx(f1)
    assert exact_match(prediction, answers, "all") == em


@given(
    st.text("aAtheTHEnB .,?é", max_size=12),
    st.lists(st.text("aAtheTHEnB .,?é", min_size=1, max_size=12), min_size=1, max_size=3),
)
def test_whatever_is_left_of_every_answer_is_scored_as_longbench_does(prediction, answers):
    words = normalize_answer(prediction).split()
    references = [normalize_answer(answer).split() for answer in answers]
    if all(references):
        shared = [(Counter(words) & Counter(reference)).total() for reference in references]
        lengths = [len(words) + len(reference) for reference in references]
        expected = max(2 * common / length for common, length in zip(shared, lengths, strict=True))
        assert f1_score(prediction, answers) == pytest.approx(expected)
        assert exact_match(prediction, answers) == (words in references)


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
def test_recall_is_rulers_string_match(prediction, answers, match, expected):
    assert recall(prediction, answers, match) == expected


def sums(loss: float, tokens: int, *asked: tuple[str, list[str], str]) -> dict[str, float]:
    found = [scores(*question) for question in asked]
    return {"loss": loss, "tokens": tokens, "count": len(asked)} | {
        name: sum(each[name] for each in found) for name in found[0]
    }


def test_means_are_over_questions_and_tokens():
    parts = [sums(4.0, 3, ("in Paris", ["Paris"], "any"), ("11", ["11", "22"], "all"))]
    parts.append(sums(1.0, 2, ("x", ["y"], "any")))
    assert means(parts, generated=True) == pytest.approx(
        {"loss": 5 / 5, "f1": (2 / 3 + 2 / 3) / 3, "em": 0.0, "recall": 1.5 / 3, "count": 3}
    )


def test_sums_of_processes_add_up():
    first = sums(2.0, 2, ("Paris", ["Paris"], "any"), ("Rome", ["Paris"], "any"))
    whole = means([first, {}, sums(4.0, 1, ("Paris", ["Paris"], "any"))], generated=True)
    assert whole == pytest.approx({"loss": 2.0, "f1": 2 / 3, "em": 2 / 3, "recall": 2 / 3, "count": 3})


def test_losses_alone_and_parts_without_a_question():
    assert means([{}, {"loss": 3.0, "tokens": 2, "count": 1}], generated=False) == {"loss": 1.5, "count": 1}
    none = means([{}, {}], generated=True)
    assert none.pop("count") == 0
    assert none.keys() == {"loss", "f1", "em", "recall"}
    assert all(math.isnan(value) for value in none.values())


def test_the_functions_do_without_torch():
    assert "torch" not in modules_after("import lrsa_lit.evaluation.answer_scores, lrsa_lit.data.prompts")


@pytest.mark.parametrize(
    ("prediction", "score"),
    [
        ("aB3 abcd", 1.0),
        ("  aB3abcd\n", 1.0),
        ("aB3 abxx", 0.5),
        ("aB3 dcba", 0.25),
        ("aB3 abcdefgh", 2 / 3),
        ("aB3", 0.0),
        ("ab3 abcd", 0.0),
        ("Here it is: aB3 abcd", 0.0),
        ("", 0.0),
    ],
)
def test_a_text_to_repeat_is_scored_behind_its_first_word(prediction, score):
    assert verbatim_score(prediction, "aB3 abcd") == pytest.approx(score)
    assert f1_score(prediction, ["aB3 abcd"], "verbatim") == pytest.approx(score)


@given(st.text("ab c\n", min_size=1).filter(str.strip), st.text("ab c\n"))
def test_only_the_whole_text_is_verbatim(text, other):
    score = verbatim_score(f"x {other}", f"x {text}")
    assert 0 <= score <= 1
    assert (score == 1) == (other.strip() == text.strip())


def test_a_long_text_is_compared_as_a_short_one_is():
    """difflib would take frequent characters of 200 or more for junk."""
    text = "the quick brown fox " * 12
    assert verbatim_score(f"x ?{text[1:]}", f"x {text}") > 0.99
