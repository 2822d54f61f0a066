"""Rotary positions (RoPE, arXiv 2104.09864): remove the rotation of keys and apply another.

Dimensions: T tokens, D head_dim.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lrsa_lit.errors import UserError


@functools.lru_cache(maxsize=8)
def _on_device(frequencies: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """The frequencies (n,), copied once, so that the host does not wait for the GPU at each token."""
    with torch.inference_mode(False):
        return torch.tensor(frequencies, dtype=dtype, device=device)


@dataclass(frozen=True)
class Rotary:
    """The rotation of a model's keys and queries: channels i and i + n form a pair, rotated by position times f_i.

    Args:
        frequencies: f_0 … f_(n-1), radians per position. Channels from 2n on are not rotated.
        scaling: factor of the rotated channels (the ``attention_scaling`` of YaRN).
    """

    frequencies: tuple[float, ...]
    scaling: float = 1.0

    @classmethod
    def plain(cls, dim: int, theta: float = 10000.0) -> Rotary:
        """The usual frequencies theta ** (-2i / D), for all D channels."""
        return cls(tuple(theta ** (-2 * i / dim) for i in range(dim // 2)))

    def rotate(self, x: Tensor, positions: Tensor | Sequence[float]) -> Tensor:
        """Apply the rotation.

        Args:
            x: (…, T, D), not rotated.
            positions: (T,), or broadcastable to (…, T); integers or fractions.

        Returns:
            (…, T, D) in float32, or float64 if x is float64; differentiable in x.

        Raises:
            UserError: x has fewer channels than are rotated.
        """
        cos, sin = self.tables(positions, x)
        return self._turned(x, cos * self.scaling, sin * self.scaling)

    def unrotate(self, x: Tensor, positions: Tensor | Sequence[float]) -> Tensor:
        """Remove the rotation: the inverse of :meth:`rotate`, with the same arguments."""
        cos, sin = self.tables(positions, x)
        return self._turned(x, cos / self.scaling, -sin / self.scaling)

    def rotate_to_mean(self, x: Tensor, positions: Tensor) -> Tensor:
        """Rotate x (…, D) to each of the positions (N,) and return the mean, (…, D)."""
        cos, sin = (table.mean(dim=0) * self.scaling for table in self.tables(positions, x))
        return self._turned(x, cos, sin)

    def tables(self, positions: Tensor | Sequence[float], like: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines (…, T, n) of the angles, without the scaling, in the dtype that ``like`` is rotated in."""
        dtype = torch.promote_types(like.dtype, torch.float32)
        frequencies = _on_device(self.frequencies, dtype, like.device)
        # Angles are rounded as in transformers, so that its rotation is removed exactly, even at far positions.
        angles = torch.as_tensor(positions, device=like.device).to(dtype)[..., None] * frequencies
        return angles.cos(), angles.sin()

    def _turned(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        pairs = len(self.frequencies)
        if x.shape[-1] < 2 * pairs:
            raise UserError("rotary", 2 * pairs, f"at most {x.shape[-1]} rotated channels, as a key has")
        x = x.to(cos.dtype)
        first, second, rest = x.split((pairs, pairs, x.shape[-1] - 2 * pairs), dim=-1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)
