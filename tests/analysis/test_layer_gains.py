"""The ranking of layers and what it suggests, from losses written by hand."""

import json
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from lrsa_lit.analysis.layer_gains import LayerGains, Question, suggest
from lrsa_lit.attention import LRSAConfig


def gains(single, *, none=(4.0, 8.0), dense=(2.0, 4.0), tokens=(2, 4)):
    of_questions = zip(tokens, zip(none, *single, dense, strict=True), strict=True)
    questions = [Question(f"q{n}", n, False, count, [*losses]) for n, (count, losses) in enumerate(of_questions)]
    return LayerGains(LRSAConfig(4, 32, 8), "tiny", questions)


def test_layers_are_ranked_by_the_fall_of_the_loss_a_token():
    found = gains([[4.0, 8.0], [3.0, 6.0], [4.5, 9.5], [4.0, 5.0]])
    layers, found = zip(*found.ranking, strict=True)
    assert layers == (1, 3, 0, 2)
    assert [gain.loss for gain in found] == [1.5, 1.5, 2.0, 14 / 6]
    assert [gain.fall for gain in found] == [0.5, 0.5, 0.0, -2 / 6]
    # Of layer 1 both questions say the same, of layer 3 one says 0 and the other 3 / 4.
    assert found[0][2:] == (0.5, 0.5)
    assert found[1][2:] == (0.0, 0.75)


def test_a_layer_that_does_not_help_is_not_suggested():
    found = gains([[4.0, 8.0], [3.0, 6.0], [4.5, 9.5], [4.0, 5.0]])
    assert found.suggestion(0.9).dense_layers == (1, 3)
    assert gains([[4.0, 8.0], [4.0, 9.0]]).suggestion(0.5) == ((), 16, 0.5)


def test_the_suggestion_of_a_model_of_30_layers():
    best = [23, 18, 20, 7, 5, 24, 17, 22, 21]
    found = suggest(best, 30, 512, 0.25)
    assert found == ((5, 7, 17, 18, 20, 23, 24), 11, pytest.approx(0.25, abs=5e-4))
    assert str(found) == "25 % kept: --model.lrsa.dense_layers '[5, 7, 17, 18, 20, 23, 24]' --model.lrsa.top_k 11"


@st.composite
def questions(draw):
    layers, lag_size = draw(st.integers(1, 64)), draw(st.integers(2, 512))
    best = draw(st.lists(st.integers(0, layers - 1), unique=True))
    share = draw(st.integers(-(-1000 // lag_size), 999)) / 1000
    return best, layers, lag_size, share


@given(questions())
def test_the_share_is_never_exceeded_and_used_up(question):
    best, layers, lag_size, share = question
    found = suggest(best, layers, lag_size, share)
    budget = Fraction(str(share))

    def kept(dense, top_k):
        return (dense + (layers - dense) * Fraction(top_k, lag_size)) / layers

    count = len(found.dense_layers)
    assert found.dense_layers == tuple(sorted(best[:count]))
    assert 1 <= found.top_k < lag_size
    assert found.kept == float(kept(count, found.top_k))
    assert kept(count, found.top_k) <= budget
    assert count == len(best) or kept(count + 1, 1) > budget
    assert kept(count, found.top_k + 1) > budget


def test_a_decimal_share_is_taken_as_it_is_written():
    # As binary numbers, 0.2971 and 0.29 of 100 layers are a little less than that.
    assert len(suggest(range(100), 100, 100, 0.2971).dense_layers) == 29
    assert suggest([], 100, 100, 0.29) == ((), 29, 0.29)


def test_the_table_and_plain_values(capsys):
    found = gains([[4.0, 8.0], [3.0, 6.0]])
    Console().print(found.table())
    shown = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.strip("│ ").split("│")] for line in shown.splitlines() if "│" in line]
    assert rows == [
        ["layer 1", "1.5000", "0.5000", "[0.5000, 0.5000]"],
        ["layer 0", "2.0000", "0.0000", "[0.0000, 0.0000]"],
        ["none", "2.0000"],
        ["all", "1.0000", "1.0000", "[1.0000, 1.0000]"],
    ]
    values = json.loads(json.dumps(found.to_dict(0.6)))
    assert LRSAConfig.from_dict(values["rule"]) == found.rule
    assert values["ranking"][0] == {"layer": 1, "loss": 1.5, "fall": 0.5, "low": 0.5, "high": 0.5}
    assert values["suggestion"] == {"dense_layers": [1], "top_k": 6, "kept": 0.59375}
    assert values["questions"]["layers"] == [[4.0, 8.0], [3.0, 6.0]]


def test_a_single_question_has_no_interval(capsys):
    Console().print(gains([[3.0]], none=[4.0], dense=[2.0], tokens=[2]).table())
    shown = capsys.readouterr().out
    assert "questions" not in shown
    assert "[" not in shown
