"""Draws: the likeliest, shares of the probability, and the same token whoever else is drawn."""

import collections
import random

import pytest
import torch

from lrsa_lit.serving.sampling import next_tokens

LOGITS = torch.tensor([2.0, 1.0, 0.0, -1.0, 3.0], dtype=torch.float64)


def drawn(temperature, top_p, number):
    return next_tokens(LOGITS[None], [temperature], [top_p], [number])[0]


def test_without_temperature_it_is_the_likeliest():
    assert drawn(0, 1.0, 0.999) == 4


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_are_drawn_with_their_probabilities(temperature):
    numbers = [(each + 0.5) / 2000 for each in range(2000)]
    counts = collections.Counter(next_tokens(LOGITS.expand(2000, -1), [temperature] * 2000, [1.0] * 2000, numbers))
    expected = (LOGITS / temperature).softmax(dim=-1)
    for token, share in enumerate(expected.tolist()):
        assert abs(counts[token] / 2000 - share) <= 1 / 2000


@pytest.mark.parametrize(
    ("top_p", "kept"), [(1e-9, {4}), (0.6, {4}), (0.7, {4, 0}), (0.9, {4, 0, 1}), (1.0, {0, 1, 2, 3, 4})]
)
def test_the_likeliest_that_reach_the_share_are_drawn_from(top_p, kept):
    assert {drawn(1.0, top_p, number / 997) for number in range(997)} == kept


def test_ends_of_the_range_are_tokens():
    assert drawn(1.0, 1.0, 0.0) == 4
    assert drawn(1.0, 1.0, 1 - 2**-53) == 3


def test_rows_do_not_know_each_other():
    draw = random.Random(3)
    logits = torch.randn(20, 50, generator=torch.Generator().manual_seed(0))
    given = [[draw.choice([0, 0.7, 1.5]) for _ in range(20)], [draw.uniform(0.1, 1) for _ in range(20)]]
    given.append([draw.random() for _ in range(20)])
    alone = [next_tokens(logits[row : row + 1], *([each[row]] for each in given))[0] for row in range(20)]
    assert next_tokens(logits, *given) == alone


def test_a_token_that_cannot_be_is_never_drawn():
    logits = torch.tensor([[0.0, -torch.inf, 0.0]])
    assert {next_tokens(logits, [1.0], [1.0], [number / 50])[0] for number in range(50)} == {0, 2}
