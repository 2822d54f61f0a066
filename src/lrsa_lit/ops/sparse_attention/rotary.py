"""Rotary positions (RoPE, arXiv 2104.09864), so that what works on keys can take their rotation off and put one on.

Dimensions: T tokens, D head_dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lrsa_lit.errors import UserError


@dataclass(frozen=True)
class Rotary:
    """The rotation of a model's keys and queries: channels i and i + n form a pair that turns by position times f_i.

    Args:
        frequencies: f_0 … f_(n-1), radians per position. Channels from 2n on are not rotated; with n = 0 none is.
        scaling: factor of the rotated channels (the ``attention_scaling`` of YaRN).
    """

    frequencies: tuple[float, ...]
    scaling: float = 1.0

    @classmethod
    def plain(cls, dim: int, theta: float = 10000.0) -> Rotary:
        """The usual frequencies theta ** (-2i / D) of all D channels."""
        return cls(tuple(theta ** (-2 * i / dim) for i in range(dim // 2)))

    def rotate(self, x: Tensor, positions: Tensor | Sequence[float]) -> Tensor:
        """Put the rotation on.

        Args:
            x: (…, T, D), not rotated.
            positions: (T,), or what broadcasts to (…, T), whole or fractional.

        Returns:
            (…, T, D) in float32, or float64 where x is; differentiable in x.

        Raises:
            UserError: x has fewer channels than are rotated.
        """
        cos, sin = self.tables(positions, x)
        return self._turned(x, cos * self.scaling, sin * self.scaling)

    def unrotate(self, x: Tensor, positions: Tensor | Sequence[float]) -> Tensor:
        """Take the rotation off again: the inverse of :meth:`rotate`, arguments alike."""
        cos, sin = self.tables(positions, x)
        return self._turned(x, cos / self.scaling, -sin / self.scaling)

    def rotate_to_mean(self, x: Tensor, positions: Tensor) -> Tensor:
        """The mean over positions (N,) of what x (…, D) is rotated to at each of them: (…, D)."""
        cos, sin = (table.mean(dim=0) * self.scaling for table in self.tables(positions, x))
        return self._turned(x, cos, sin)

    def tables(self, positions: Tensor | Sequence[float], like: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines (…, T, n) of the angles, without the scaling, in the dtype of the results for ``like``."""
        dtype = torch.promote_types(like.dtype, torch.float32)
        # From pinned memory, so that the host does not wait for the GPU.
        host = torch.tensor(self.frequencies, dtype=dtype, device="cpu", pin_memory=like.is_cuda)
        frequencies = host.to(like.device, non_blocking=True)
        # Angles are rounded as transformers rounds them: what it rotated is taken off exactly, however far it stands.
        angles = torch.as_tensor(positions, device=like.device).to(dtype)[..., None] * frequencies
        return angles.cos(), angles.sin()

    def _turned(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        pairs = len(self.frequencies)
        if x.shape[-1] < 2 * pairs:
            raise UserError("rotary", 2 * pairs, f"at most {x.shape[-1]} rotated channels, as a key has")
        x = x.to(cos.dtype)
        first, second, rest = x.split((pairs, pairs, x.shape[-1] - 2 * pairs), dim=-1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)
