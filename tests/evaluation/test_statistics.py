"""Intervals and p-values on cases whose answer is known."""

import itertools

import numpy as np
import pytest
from helpers import refused

from lrsa_lit.evaluation import statistics


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


def test_few_seeds_are_drawn_with_the_variance_of_their_mean():
    # Scores that the seed alone decides: the mean of R of them has the variance s^2 / R, of s^2 over R - 1.
    for seeds in ([0.1, 0.5], [0.2, 0.3, 0.7]):
        means = statistics._means([np.repeat(np.array(seeds)[:, None], 40, axis=1)], None, 20_000, 0)
        assert means[0].var() == pytest.approx(np.var(seeds, ddof=1) / len(seeds), rel=0.05)


def test_one_models_seeds_are_drawn_together():
    strong = np.repeat(np.array([[0.2], [0.5], [0.8]]), 60, axis=1)
    together = statistics.compare(strong + 0.1, strong, same_seeds=True)
    assert together.difference == pytest.approx((0.1, 0.1, 0.1))
    apart = statistics.compare(strong + 0.1, strong)
    assert apart.difference.low < -0.2 < 0.4 < apart.difference.high


def test_questions_about_one_text_are_one_draw():
    rng = np.random.default_rng(4)
    texts = rng.integers(0, 2, 30).astype(float)
    groups = np.repeat(np.arange(30), 10)
    scores = texts[groups][None]
    alone, grouped, single = statistics.mean(scores), statistics.mean(scores, groups), statistics.mean(texts[None])
    assert grouped.value == alone.value
    assert grouped[1:] == pytest.approx(single[1:])
    assert grouped.high - grouped.low > 2.5 * (alone.high - alone.low)
    # Seven texts of one sign: 2 of 2^7 signs are as extreme, however many questions each has.
    seven = np.repeat(np.arange(7), 20)
    found = statistics.compare(np.full((1, 140), 0.6), np.full((1, 140), 0.5), seven)
    assert found.p_value == pytest.approx(2 / 2**7, abs=0.004)


def test_groups_weigh_as_many_questions_as_they_have():
    scores, groups = np.array([[1.0, 0.0, 0.0, 0.0]]), np.array([0, 1, 1, 1])
    found = statistics.mean(scores, groups)
    assert found == (0.25, 0.0, 1.0)


@pytest.mark.parametrize("draws", [1, 499, 750, 1000])
def test_as_many_draws_as_asked(draws):
    rng = np.random.default_rng(0)
    assert len(statistics._means([np.ones((1, 3))], None, draws, 0)[0]) == draws
    assert statistics.permutation_p_value(np.array([1.0, 1.0, 1.0, -3.0]), rng, draws) >= 1 / (draws + 1)


def test_a_difference_of_nothing_but_rounding_is_none():
    differences = np.array([0.1, 0.2, -0.3])
    assert differences.sum() != 0.0
    assert statistics.permutation_p_value(differences, np.random.default_rng(0), 1000) == 1.0


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
    assert np.isnan(statistics.compare(np.ones((1, 5)), np.zeros((1, 5))).ratio).all()


def test_holm_by_hand():
    assert statistics.holm([0.01, 0.04, 0.03, 0.5]) == pytest.approx([0.04, 0.09, 0.09, 0.5])


def test_other_questions_cannot_be_paired():
    with refused("scores"):
        statistics.compare(np.ones((1, 3)), np.ones((1, 4)))
