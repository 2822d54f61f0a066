import subprocess
import sys

import pytest
import torch

from lrsa_lit.metrics import exact_match, f1_score, normalize_answer, recall
from lrsa_lit.qa_score import QAScore


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
        ("the", ["A"], 0.0, 1.0),  # as in the published qa_f1_score, in which nothing has no F1
        ("1999", ["in 1999", "1999"], 1.0, 1.0),
        ("1999", ["1999", "in the summer of 1999"], 1.0, 1.0),
    ],
)
def test_f1_and_exact_match_take_the_best_of_alternatives(prediction: str, answers: list[str], f1: float, em: float):
    assert f1_score(prediction, answers) == pytest.approx(f1)
    assert exact_match(prediction, answers) == em


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
    score.update(["in Paris"], [("Paris",)], ["any"])
    score.update(["11", "x"], [("11", "22"), ("y",)], ["all", "any"])
    result = {name: value.item() for name, value in score.compute().items()}
    assert result == pytest.approx({"f1": (2 / 3 + 2 / 3) / 3, "em": 0.0, "recall": 1.5 / 3, "count": 3})


def test_score_state_is_summed_across_processes():
    parts = [QAScore(), QAScore()]
    parts[0].update(["Paris", "Rome"], [("Paris",), ("Paris",)], ["any", "any"])
    parts[1].update(["Paris"], [("Paris",)], ["any"])
    whole = QAScore()
    for name, reduction in whole._reductions.items():
        setattr(whole, name, reduction(torch.stack([getattr(part, name) for part in parts])))
    assert whole.f1 / whole.count == pytest.approx(2 / 3)
    assert whole.count == 3


def test_the_functions_do_without_torch():
    code = "import sys, lrsa_lit.metrics, lrsa_lit.data.prompts; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
