"""Intervals and p-values for scores of the same questions under several seeds.

Dimensions: R seeds, Q questions, G groups of questions that share a context, n draws.

Questions are drawn with replacement, each with all of its seeds, so that a question counts as one however many models
answered it. Questions about one text are no independent ones: they are drawn together, as a group. Seeds are drawn as
well, where there is more than one: R - 1 of R, as draws of R of so few would have (R - 1) / R of the variance; of two
or three seeds the intervals are rough all the same. SciPy's bootstrap and permutation test know no such clusters of two
kinds, and are not needed for means.

The p-values are of the questions alone: they say whether these trained models differ on other such questions, and
the intervals and ``p_drawn`` whether other trainings would.
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
"""(Q,) number of each question's group, from 0 on."""

DRAWS = 10_000
_BLOCK = 500


class Estimate(NamedTuple):
    """A number with its 95 % interval (percentiles of the bootstrap)."""

    value: float
    low: float
    high: float

    def exp(self) -> Estimate:
        """The perplexity of a loss in nats for each token."""
        return Estimate(*map(math.exp, self))


class Comparison(NamedTuple):
    """Two means on the same questions: first - second, first / second (NaN where that is 0), and a two-sided p-value.

    Attributes:
        p_value: of the questions' signs being exchangeable (a paired permutation test).
        p_drawn: twice the share of draws of questions and seeds in which the difference has the other sign.
    """

    difference: Estimate
    ratio: Estimate
    p_value: float
    p_drawn: float


def mean(scores: Scores, groups: Groups | None = None, *, draws: int = DRAWS, seed: int = 0) -> Estimate:
    """Mean of scores (R, Q), in groups (Q,)."""
    return _estimate(scores.mean(), _means([_checked(scores)], groups, draws, seed)[0])


def ratio_of_sums(
    numerator: Scores, denominator: Scores, groups: Groups | None = None, *, draws: int = DRAWS, seed: int = 0
) -> Estimate:
    """Sum of (R, Q) by the sum of another (R, Q), as losses by tokens: both drawn together."""
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
    """Scores (R, Q) against other ones (R', Q) of the same questions.

    Each draw takes the same questions on both sides, which removes what makes a question hard for both. With
    ``same_seeds`` it takes the same seeds too, since both are of the same trained weights, R = R'; else they are drawn
    apart, since equal seeds of two trainings have little in common.
    """
    if first.shape[1] != second.shape[1]:
        reason = f"of {first.shape[1]} and {second.shape[1]} questions; they must be of the same ones"
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
    """Two-sided p-value of the mean of paired differences (Q,) under random signs; never 0, as one draw is the data.

    The questions of a group change their sign together.
    """
    sums = _grouped(differences[None], groups)[0]
    # Sums in another order differ in their last bits.
    observed = abs(sums.sum()) - 1e-12 * np.abs(sums).sum()
    signs = (rng.integers(0, 2, (size, len(sums)), dtype=np.int8) * 2 - 1 for size in _blocks(draws))
    extreme = sum(int((np.abs(block @ sums) >= observed).sum()) for block in signs)
    return (extreme + 1) / (draws + 1)


def holm(p_values: list[float]) -> list[float]:
    """P-values of a family of tests, adjusted by Holm's method."""
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, p_values[index] * (len(p_values) - rank)))
        adjusted[index] = largest
    return adjusted


def _means(
    sides: list[Scores], groups: Groups | None, draws: int, seed: int, *, same_seeds: bool = False
) -> list[NDArray[np.float64]]:
    """Means of each side (n,) under the same drawn questions."""
    sums = [_grouped(side, groups) for side in sides]
    sizes = _grouped(np.ones((1, sides[0].shape[1])), groups)[0]
    rng, found = np.random.default_rng([seed, 1]), []
    for counts in np.split(_questions(len(sizes), draws, seed), np.cumsum(_blocks(draws))[:-1]):
        drawn = counts.astype(np.float64)
        runs = [_seeds(rng, len(drawn), len(side)) for side in sides]
        runs = [runs[0]] * len(sides) if same_seeds else runs
        total = drawn @ sizes
        # Each draw's seeds are summed last: a product of two matrices, and as many numbers as seeds.
        found.append([(run * (drawn @ side.T)).sum(axis=1) / total for run, side in zip(runs, sums, strict=True)])
    return [np.concatenate(parts) for parts in zip(*found, strict=True)]


@functools.lru_cache(maxsize=4)
def _questions(count: int, draws: int, seed: int) -> NDArray[np.uint8]:
    """(n, G) how often each group is drawn: the same in every comparison, and slower to draw than all that follows."""
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
    """In pieces, so that thousands of questions need no gigabytes."""
    return [min(_BLOCK, draws - start) for start in range(0, draws, _BLOCK)]


def _checked(scores: Scores) -> Scores:
    if scores.ndim != 2 or 0 in scores.shape:
        raise UserError("scores", scores.shape, "(seeds, questions)")
    return scores


def _p_drawn(differences: NDArray[np.float64]) -> float:
    """Never 0, as one draw is the data."""
    rarer = min((differences <= 0).sum(), (differences >= 0).sum())
    return min(1.0, 2 * float(rarer + 1) / (len(differences) + 1))


def _estimate(value: float, drawn: NDArray[np.float64]) -> Estimate:
    low, high = np.nanquantile(drawn, [0.025, 0.975]) if np.isfinite(drawn).any() else (np.nan, np.nan)
    return Estimate(float(value), float(low), float(high))
