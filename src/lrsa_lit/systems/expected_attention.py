"""One-shot selection by the expected attention of future queries.

Dimensions: B batch, H key-value heads, G query heads of each, T tokens of the prompt, D head_dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lrsa_lit.bounds import check_integers, check_setting, is_weight
from lrsa_lit.systems.one_shot import OneShot, Prompt, forced


@dataclass(frozen=True)
class ExpectedAttention(OneShot):
    """Keep the pairs that future queries are expected to attend to most (arXiv 2510.00636, as in kvpress).

    Future queries are assumed to be normally distributed. Their mean mu and covariance Sigma are those of the prompt's
    queries before rotation, rotated by the mean rotation of the next positions.

    Args:
        future: number of future positions to average the rotation over.
        sink_size: number of first tokens, which are always kept and whose queries are ignored.
        covariance: use Sigma; if false, mu alone.
        value_norm: weight the probability by the norm of the value.
        epsilon: number added to the probability before this weighting.
    """

    future: int = 512
    sink_size: int = 4
    covariance: bool = True
    value_norm: bool = True
    epsilon: float = 0.0
    needs_rotary: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integers(self, 1, "future")
        check_integers(self, 0, "sink_size")
        check_setting("epsilon", self.epsilon, is_weight(self.epsilon), "a finite number >= 0")
        object.__setattr__(self, "moments_from", self.sink_size)

    def scores(self, prompt: Prompt) -> Tensor:
        """The expected probability, mean over the group, times the norm. Sinks get the highest score plus 1."""
        dtype = torch.promote_types(prompt.key.dtype, torch.float32)
        key, value = (x[:, :, self.sink_size :].to(dtype) for x in (prompt.key, prompt.value))
        if prompt.moments is None:
            return forced(key.norm(dim=-1), prompt.tokens, 0)
        expected = self._expected(key[:, :, None], prompt).mean(dim=2)
        if self.value_norm:
            expected = (expected + self.epsilon) * value.norm(dim=-1)
        return forced(expected, self.sink_size, 0)

    def _expected(self, key: Tensor, prompt: Prompt) -> Tensor:
        """Probabilities (B, H, G, T - sinks): the softmax of k mu s + k Sigma k s^2 / 2, with the scale s."""
        moments, rotary = prompt.moments, prompt.rotary
        assert moments is not None
        assert rotary is not None
        next_ones = torch.arange(prompt.tokens, prompt.tokens + self.future, device=key.device)
        mean = rotary.rotate_to_mean(moments.mean, next_ones)
        logits = (key @ mean[..., None]).squeeze(-1) * prompt.scale
        if self.covariance:
            half = rotary.rotate_to_mean(moments.covariance, next_ones)
            covariance = rotary.rotate_to_mean(half.mT, next_ones)
            logits = logits + ((key @ covariance) * key).sum(dim=-1) * (prompt.scale**2 / 2)
        return logits.softmax(dim=-1)
