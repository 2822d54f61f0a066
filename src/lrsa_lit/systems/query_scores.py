"""One-shot selection by the attention from the last queries of a prompt.

Dimensions: B batch, H key-value heads, G query heads of each, T tokens of the prompt, D head_dim, w window.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d, max_pool1d

from lrsa_lit.bounds import check_integers, check_setting
from lrsa_lit.errors import UserError
from lrsa_lit.systems.one_shot import OneShot, Prompt, forced


def window_attention(prompt: Prompt) -> Tensor:
    """Causal attention probabilities (B, H, G, w, T) of the last w queries over all tokens, at least float32."""
    dtype = torch.promote_types(prompt.key.dtype, torch.float32)
    logits = prompt.query.to(dtype) @ prompt.key[:, :, None].to(dtype).mT * prompt.scale
    window, tokens = logits.shape[-2:]
    hidden = torch.ones(window, tokens, dtype=torch.bool, device=logits.device).triu(tokens - window + 1)
    return logits.masked_fill_(hidden, -torch.inf).softmax(dim=-1)


@dataclass(frozen=True)
class SnapKV(OneShot):
    """Keep the last tokens and those that their queries attend to most (arXiv 2404.14469), as kvpress's SnapKVPress.

    The original sums over the window and chooses for each query head, which then has separate keys and values. This
    averages over the window and the group and chooses for each key-value head.

    Args:
        window: how many of the prompt's last queries score; their own tokens are always kept.
        kernel: tokens to pool scores over, padded with 0; odd. 1 does not pool.
        pooling: avg or max. With max, neighbours often tie; the earlier ones are kept.
    """

    window: int = 64
    kernel: int = 5
    pooling: Literal["avg", "max"] = "avg"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integers(self, 1, "window", "kernel")
        check_setting("kernel", self.kernel, self.kernel % 2 == 1, "an odd integer >= 1")
        check_setting("pooling", self.pooling, self.pooling in ("avg", "max"), "avg or max")

    def scores(self, prompt: Prompt) -> Tensor:
        """The mean probability, pooled. The window gets the highest score plus 1.

        Raises:
            UserError: the prompt has no token before the window.
        """
        if prompt.tokens <= self.window:
            reason = f"covers the whole prompt of {prompt.tokens} tokens, so no token is left to score"
            raise UserError("window", self.window, reason=reason)
        received = window_attention(prompt)[..., : prompt.tokens - self.window].mean(dim=3)
        pool = avg_pool1d if self.pooling == "avg" else max_pool1d
        pooled = pool(received.flatten(1, 2), self.kernel, stride=1, padding=self.kernel // 2)
        return forced(pooled.view_as(received).mean(dim=2), 0, self.window)


@dataclass(frozen=True)
class TOVA(OneShot):
    """Keep the tokens that the last query attends to most, the same in all heads, as kvpress's TOVAPress.

    The original (arXiv 2401.06104) chooses again at each token of the answer, and does not always keep the last token.
    """

    window = 1

    def scores(self, prompt: Prompt) -> Tensor:
        """The mean probability over all query heads. The last token gets the highest score plus 1."""
        received = window_attention(prompt)[:, :, :, -1, :-1].mean(dim=(1, 2))
        return forced(received[:, None].expand(-1, prompt.key.shape[1], -1), 0, 1)
