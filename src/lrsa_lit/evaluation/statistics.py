"""Bootstrap intervals and permutation p-values for scores of the same questions under several seeds.

Dimensions: R seeds, Q questions, G groups of questions that share a context, n resamples.

Questions are resampled with replacement, each with all of its seeds, so a question counts once however many models
answered it. Questions about one text are not independent, so they are resampled together, as a group. If there are
several seeds, they are resampled as well: R - 1 of R, because R of R would have only (R - 1) / R of the variance. With
two or three seeds, the intervals are rough nevertheless. SciPy's bootstrap and permutation test do not support these
two kinds of clusters.

The p-values cover only the questions: they tell whether these trained models would differ on other questions of this
kind. The intervals and ``p_drawn`` tell whether other trainings would differ.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lrsa_lit.errors import UserError

Scores = NDArray[np.float64]
Groups = NDArray[np.int64]
"""(Q,) the number of each question's group, counting from 0."""

DRAWS = 10_000
_BLOCK = 500


class Estimate(NamedTuple):
    """A value with its 95 % bootstrap percentile interval."""

    value: float
    low: float
    high: float

    def exp(self) -> Estimate:
        """The perplexity of a loss in nats per token."""
        return Estimate(*map(math.exp, self))


class Comparison(NamedTuple):
    """The comparison of two means on the same questions.

    Attributes:
        difference: first - second.
        ratio: first / second; NaN if the second is 0.
        p_value: two-sided p-value of a paired permutation test (sign flips) over the questions.
        p_drawn: twice the share of resamples of questions and seeds in which the difference has the other sign.
    """

    difference: Estimate
    ratio: Estimate
    p_value: float
    p_drawn: float


def mean(scores: Scores, groups: Groups | None = None, *, draws: int = DRAWS, seed: int = 0) -> Estimate:
    """Mean of scores (R, Q); ``groups`` (Q,) are resampled together."""
    return _estimate(scores.mean(), _means([_checked(scores)], groups, draws, seed)[0])


def ratio_of_sums(
    numerator: Scores, denominator: Scores, groups: Groups | None = None, *, draws: int = DRAWS, seed: int = 0
) -> Estimate:
    """Sum of one (R, Q) divided by the sum of another, for example losses by tokens; both use the same resamples."""
    above, below = _means([_checked(numerator), _checked(denominator)], groups, draws, seed, same_seeds=True)
    return _estimate(numerator.mean() / denominator.mean(), above / below)


def compare(
    first: Scores,
    second: Scores,
    groups: Groups | None = None,
    *,
    same_seeds: bool = False,
    draws: int = DRAWS,
    seed: int = 0,
) -> Comparison:
    """Compare scores (R, Q) with scores (R', Q) of the same questions.

    Each resample takes the same questions on both sides, which removes the difficulty of questions that both share. Set
    ``same_seeds`` if both sides have the same trained weights (R = R'): then each resample also takes the same seeds.
    Otherwise seeds are resampled independently, because equal seeds of two trainings have little in common.

    Raises:
        UserError: the numbers of questions differ, or there are no scores.
    """
    if first.shape[1] != second.shape[1]:
        reason = f"are for {first.shape[1]} and {second.shape[1]} questions; both sides need the same questions"
        raise UserError("scores", reason=reason)
    one, other = _means([_checked(first), _checked(second)], groups, draws, seed, same_seeds=same_seeds)
    difference = _estimate(first.mean() - second.mean(), one - other)
    ratio = Estimate(np.nan, np.nan, np.nan)
    if second.any():
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = _estimate(first.mean() / second.mean(), one / other)
    rng = np.random.default_rng(seed)
    p_value = permutation_p_value(first.mean(axis=0) - second.mean(axis=0), rng, draws, groups)
    return Comparison(difference, ratio, p_value, _p_drawn(one - other))


def permutation_p_value(
    differences: Scores, rng: np.random.Generator, draws: int = DRAWS, groups: Groups | None = None
) -> float:
    """Two-sided p-value of the mean of paired differences (Q,) under random sign flips.

    The questions of a group flip together. The observed data count as one draw, so the value is never 0.
    """
    sums = _grouped(differences[None], groups)[0]
    # The tolerance allows for rounding: summation in another order changes the last bits.
    observed = abs(sums.sum()) - 1e-12 * np.abs(sums).sum()
    signs = (rng.integers(0, 2, (size, len(sums)), dtype=np.int8) * 2 - 1 for size in _blocks(draws))
    extreme = sum(int((np.abs(block @ sums) >= observed).sum()) for block in signs)
    return (extreme + 1) / (draws + 1)


def holm(p_values: list[float]) -> list[float]:
    """Adjust the p-values of a family of tests by Holm's method."""
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, p_values[index] * (len(p_values) - rank)))
        adjusted[index] = largest
    return adjusted


def _means(
    sides: list[Scores], groups: Groups | None, draws: int, seed: int, *, same_seeds: bool = False
) -> list[NDArray[np.float64]]:
    """Resampled means (n,) of each side, with the same resampled questions for all sides."""
    sums = [_grouped(side, groups) for side in sides]
    sizes = _grouped(np.ones((1, sides[0].shape[1])), groups)[0]
    rng, found = np.random.default_rng([seed, 1]), []
    for counts in np.split(_questions(len(sizes), draws, seed), np.cumsum(_blocks(draws))[:-1]):
        drawn = counts.astype(np.float64)
        runs = [_seeds(rng, len(drawn), len(side)) for side in sides]
        runs = [runs[0]] * len(sides) if same_seeds else runs
        total = drawn @ sizes
        # Sum over seeds last: the matrix product then has only one column per seed.
        found.append([(run * (drawn @ side.T)).sum(axis=1) / total for run, side in zip(runs, sums, strict=True)])
    return [np.concatenate(parts) for parts in zip(*found, strict=True)]


@functools.lru_cache(maxsize=4)
def _questions(count: int, draws: int, seed: int) -> NDArray[np.uint8]:
    """(n, G) how often each group is drawn; cached, as drawing is the slowest step and all comparisons share it."""
    rng = np.random.default_rng(seed)
    even = np.full(count, 1 / count)
    return np.concatenate([rng.multinomial(count, even, size=size).astype(np.uint8) for size in _blocks(draws)])


def _grouped(scores: Scores, groups: Groups | None) -> Scores:
    """Sums (R, G) of scores (R, Q)."""
    if groups is None:
        return scores
    return np.stack([np.bincount(groups, weights=row) for row in scores])


def _seeds(rng: np.random.Generator, draws: int, count: int) -> NDArray[np.float64]:
    drawn = max(1, count - 1)
    return rng.multinomial(drawn, np.full(count, 1 / count), size=draws) / drawn


def _blocks(draws: int) -> list[int]:
    """Sizes of blocks of draws, which limit the memory for thousands of questions."""
    return [min(_BLOCK, draws - start) for start in range(0, draws, _BLOCK)]


def _checked(scores: Scores) -> Scores:
    if scores.ndim != 2 or 0 in scores.shape:
        raise UserError("scores", scores.shape, "(seeds, questions)")
    return scores


def _p_drawn(differences: NDArray[np.float64]) -> float:
    """Twice the share of differences with the rarer sign; never 0, because the data count as one draw."""
    rarer = min((differences <= 0).sum(), (differences >= 0).sum())
    return min(1.0, 2 * float(rarer + 1) / (len(differences) + 1))


def _estimate(value: float, drawn: NDArray[np.float64]) -> Estimate:
    low, high = np.nanquantile(drawn, [0.025, 0.975]) if np.isfinite(drawn).any() else (np.nan, np.nan)
    return Estimate(float(value), float(low), float(high))
