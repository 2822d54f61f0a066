"""Rotary positions by the formula, put on and taken off."""

import pytest
import torch
from helpers import refused

from lrsa_lit.ops.sparse_attention import Rotary


def by_complex_numbers(x, positions, theta=10000.0):
    """Channels i and i + D/2 as one complex number, turned by position * theta ** (-2i/D)."""
    half = x.shape[-1] // 2
    angles = torch.tensor(positions, dtype=torch.float64)[:, None] * theta ** (
        -2 * torch.arange(half).double() / (2 * half)
    )
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([turned.real, turned.imag], dim=-1)


@pytest.mark.parametrize("positions", [[0, 1, 7], [2.5, 0.25, 1e5]], ids=["whole", "fractional"])
def test_pairs_of_channels_turn(positions):
    x = torch.randn(2, 3, 3, 6, dtype=torch.float64)
    torch.testing.assert_close(Rotary.plain(6).rotate(x, positions), by_complex_numbers(x, positions))


@pytest.mark.parametrize("scaling", [1.0, 1.7])
@pytest.mark.parametrize("pairs", [0, 1, 3])
def test_what_is_put_on_is_taken_off_and_other_channels_stay(scaling, pairs):
    x, positions = torch.randn(2, 4, 7, dtype=torch.float64), torch.rand(2, 4) * 1000
    rotary = Rotary(Rotary.plain(6).frequencies[:pairs], scaling)
    rotated = rotary.rotate(x, positions)
    assert rotated[..., 2 * pairs :].equal(x[..., 2 * pairs :])
    assert rotated.equal(x) == (pairs == 0)
    torch.testing.assert_close(rotary.unrotate(rotated, positions), x)


def test_far_away_whole_positions_are_taken_off_as_exactly_as_near_ones():
    key, positions = torch.randn(4, 64), torch.arange(1_000_000, 1_000_004)
    rotary = Rotary.plain(64)
    torch.testing.assert_close(rotary.unrotate(rotary.rotate(key, positions), positions), key, rtol=0, atol=1e-5)


def test_half_precision_is_computed_in_float32_and_gradients_flow():
    half = torch.randn(3, 8).bfloat16()
    assert Rotary.plain(8).rotate(half, [0, 1, 2]).dtype == torch.float32
    x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda given: Rotary((0.5, 0.1), 1.3).rotate(given, [0.5, 1, 2]), x)


def test_it_is_a_value():
    assert hash(Rotary.plain(8)) == hash(Rotary.plain(8))
    assert Rotary.plain(8) == Rotary.plain(8) != Rotary.plain(8, theta=500.0)


def test_keys_with_fewer_channels_are_refused():
    with refused("rotary", 8, "at most 6"):
        Rotary.plain(8).rotate(torch.randn(3, 6), [0, 1, 2])
