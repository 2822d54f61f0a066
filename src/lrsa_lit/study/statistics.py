"""Intervals and p-values for scores of the same questions under several seeds.

Dimensions: R seeds, Q questions, n draws.

Questions are drawn with replacement, each with all of its seeds, so that a question counts as one however many models
answered it; seeds are drawn with replacement as well, where there is more than one. SciPy's bootstrap and permutation
test know no such clusters of two kinds, and are not needed for means.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lrsa_lit.errors import UserError

Scores = NDArray[np.float64]

DRAWS = 10_000
_BLOCK = 500


class Estimate(NamedTuple):
    """A number with its 95 % interval (percentiles of the bootstrap)."""

    value: float
    low: float
    high: float


class Comparison(NamedTuple):
    """Two sets of scores on the same questions.

    Attributes:
        difference: the first's mean less the second's.
        ratio: the first's mean by the second's; NaN where that is 0.
        p_value: two-sided, of the question's signs being exchangeable (a paired permutation test).
    """

    difference: Estimate
    ratio: Estimate
    p_value: float


def mean(scores: Scores, *, draws: int = DRAWS, seed: int = 0) -> Estimate:
    """Mean of scores (R, Q)."""
    rng = np.random.default_rng(seed)
    return _estimate(scores.mean(), _means([_checked(scores)], rng, draws)[0])


def ratio_of_sums(numerator: Scores, denominator: Scores, *, draws: int = DRAWS, seed: int = 0) -> Estimate:
    """Sum of (R, Q) by the sum of another (R, Q), as losses by tokens: both drawn together."""
    rng = np.random.default_rng(seed)
    above, below = _means([_checked(numerator), _checked(denominator)], rng, draws, same_seeds=True)
    return _estimate(numerator.mean() / denominator.mean(), above / below)


def compare(first: Scores, second: Scores, *, draws: int = DRAWS, seed: int = 0) -> Comparison:
    """Scores (R, Q) against other ones (R', Q) of the same questions.

    Each draw takes the same questions on both sides, which removes what makes a question hard for both; seeds are drawn
    apart, since equal seeds of two trainings have little in common.

    Raises:
        UserError: the numbers of questions differ.
    """
    if first.shape[1] != second.shape[1]:
        raise UserError(f"scores: of {first.shape[1]} and {second.shape[1]} questions; they must be of the same ones")
    rng = np.random.default_rng(seed)
    one, other = _means([_checked(first), _checked(second)], rng, draws)
    value = first.mean() - second.mean()
    difference = _estimate(value, one - other)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = _estimate(first.mean() / second.mean(), one / other)
    return Comparison(difference, ratio, permutation_p_value(first.mean(axis=0) - second.mean(axis=0), rng, draws))


def permutation_p_value(differences: Scores, rng: np.random.Generator, draws: int = DRAWS) -> float:
    """Two-sided p-value of the mean of paired differences (Q,) under random signs; never 0, as one draw is the data."""
    observed = abs(differences.sum()) * (1 - 1e-12)
    signs = (rng.integers(0, 2, (min(_BLOCK, draws), len(differences)), dtype=np.int8) * 2 - 1 for _ in _blocks(draws))
    extreme = sum(int((np.abs(block @ differences) >= observed).sum()) for block in signs)
    return (extreme + 1) / (sum(_blocks(draws)) + 1)


def holm(p_values: list[float]) -> list[float]:
    """P-values of a family of tests, adjusted by Holm's method."""
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, p_values[index] * (len(p_values) - rank)))
        adjusted[index] = largest
    return adjusted


def _means(
    sides: list[Scores], rng: np.random.Generator, draws: int, *, same_seeds: bool = False
) -> list[NDArray[np.float64]]:
    """Means of each side (n,) under the same drawn questions."""
    count, found = sides[0].shape[1], []
    for size in _blocks(draws):
        questions = rng.multinomial(count, np.full(count, 1 / count), size=size) / count
        runs = [_seeds(rng, size, len(side)) for side in sides]
        runs = [runs[0]] * len(sides) if same_seeds else runs
        found.append([((drawn @ side) * questions).sum(axis=1) for drawn, side in zip(runs, sides, strict=True)])
    return [np.concatenate(parts) for parts in zip(*found, strict=True)]


def _seeds(rng: np.random.Generator, draws: int, count: int) -> NDArray[np.float64]:
    weights: NDArray[np.float64] = rng.multinomial(count, np.full(count, 1 / count), size=draws) / count
    return weights


def _blocks(draws: int) -> list[int]:
    """In pieces, so that thousands of questions need no gigabytes."""
    return [_BLOCK] * (draws // _BLOCK) or [draws]


def _checked(scores: Scores) -> Scores:
    if scores.ndim != 2 or 0 in scores.shape:
        raise UserError(f"scores: shape {scores.shape} is not allowed; it must be (seeds, questions)")
    return scores


def _estimate(value: float, drawn: NDArray[np.float64]) -> Estimate:
    low, high = np.nanquantile(drawn, [0.025, 0.975]) if np.isfinite(drawn).any() else (np.nan, np.nan)
    return Estimate(float(value), float(low), float(high))
