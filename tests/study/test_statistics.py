"""Intervals and p-values on cases whose answer is known."""

import itertools

import numpy as np
import pytest

from lrsa_lit.errors import UserError
from lrsa_lit.study import statistics


def test_an_interval_of_one_seed_is_that_of_the_mean():
    scores = np.random.default_rng(0).normal(0.5, 0.2, (1, 400))
    found = statistics.mean(scores)
    error = scores.std() / 20
    assert found.value == scores.mean()
    assert found.low == pytest.approx(found.value - 1.96 * error, abs=0.1 * error)
    assert found.high == pytest.approx(found.value + 1.96 * error, abs=0.1 * error)


def test_answers_to_one_question_by_several_seeds_are_not_several_questions():
    one = np.random.default_rng(1).integers(0, 2, (1, 100)).astype(float)
    alone, thrice = statistics.mean(one), statistics.mean(np.repeat(one, 3, axis=0))
    assert thrice.high - thrice.low == pytest.approx(alone.high - alone.low, rel=0.05)


def test_seeds_that_differ_widen_the_interval():
    same = np.full((3, 50), 0.5)
    assert statistics.mean(same)[1:] == pytest.approx((0.5, 0.5))
    apart = statistics.mean(same + np.array([[-0.1], [0.0], [0.1]]))
    assert apart.low == pytest.approx(0.4, abs=0.04)
    assert apart.high == pytest.approx(0.6, abs=0.04)


def test_a_constant_gain_is_certain_however_hard_the_questions_are():
    hard = np.random.default_rng(2).random((1, 200))
    found = statistics.compare(hard + 0.1, hard)
    assert found.difference == pytest.approx((0.1, 0.1, 0.1))
    assert found.p_value < 0.001
    assert found.ratio.value == pytest.approx((hard.mean() + 0.1) / hard.mean())
    assert found.ratio.low < found.ratio.value < found.ratio.high


def test_the_p_value_is_the_share_of_signs_that_are_as_extreme():
    differences = np.array([1.0, 2.0, 3.0, -1.0, 2.5, 0.5, 1.5])
    exact = np.mean([abs(np.dot(signs, differences)) >= abs(differences.sum()) - 1e-9
                     for signs in itertools.product((-1, 1), repeat=7)])  # fmt: skip
    found = statistics.permutation_p_value(differences, np.random.default_rng(0), 20_000)
    assert found == pytest.approx(exact, abs=0.005)


def test_no_difference_is_found_as_often_as_the_level_says():
    rng = np.random.default_rng(3)
    found = [statistics.permutation_p_value(rng.normal(size=60), rng, 500) for _ in range(400)]
    assert np.mean(np.array(found) < 0.05) == pytest.approx(0.05, abs=0.03)


def test_equal_scores_have_a_p_value_of_one():
    scores = np.random.default_rng(0).random((2, 30))
    found = statistics.compare(scores, scores)
    assert found.p_value == 1.0
    assert found.difference.low <= 0.0 <= found.difference.high


def test_losses_are_weighed_by_their_tokens():
    found = statistics.ratio_of_sums(np.array([[2.0, 12.0]]), np.array([[1.0, 3.0]]))
    assert found.value == 14 / 4
    assert (found.low, found.high) == (2.0, 4.0)


def test_a_ratio_to_nothing_is_none():
    found = statistics.compare(np.zeros((1, 5)), np.zeros((1, 5)))
    assert np.isnan(found.ratio).all()


def test_holm_by_hand():
    assert statistics.holm([0.01, 0.04, 0.03, 0.5]) == pytest.approx([0.04, 0.09, 0.09, 0.5])


def test_other_questions_cannot_be_paired():
    with pytest.raises(UserError, match="same"):
        statistics.compare(np.ones((1, 3)), np.ones((1, 4)))
