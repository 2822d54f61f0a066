"""One cut by the attention that the last queries of a prompt pay to it.

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
    """Probabilities (B, H, G, w, T), at least float32, by which the last w queries attend causally to all tokens."""
    dtype = torch.promote_types(prompt.key.dtype, torch.float32)
    logits = prompt.query.to(dtype) @ prompt.key[:, :, None].to(dtype).mT * prompt.scale
    window, tokens = logits.shape[-2:]
    hidden = torch.ones(window, tokens, dtype=torch.bool, device=logits.device).triu(tokens - window + 1)
    return logits.masked_fill_(hidden, -torch.inf).softmax(dim=-1)


@dataclass(frozen=True)
class SnapKV(OneShot):
    """Keep the tokens that the last queries attend to most, and their own (arXiv 2404.14469), as kvpress's SnapKVPress.

    The original sums over the window, and chooses for each query head, which then has keys and values of its own; this
    takes means over the window and the group, and chooses for each key-value head.

    Args:
        window: queries that score; their own tokens stay.
        kernel: scores are pooled over so many neighbouring tokens, beyond which they count as 0; odd, 1 for none.
        pooling: avg, or max, which makes neighbours tie: of these the earlier stay.
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
        """Mean probability, pooled; the window has the highest plus 1.

        Raises:
            UserError: the prompt has no token in front of the window.
        """
        if prompt.tokens <= self.window:
            reason = f"takes in all of a prompt of {prompt.tokens} tokens, which nothing then scores"
            raise UserError("window", self.window, reason=reason)
        received = window_attention(prompt)[..., : prompt.tokens - self.window].mean(dim=3)
        pool = avg_pool1d if self.pooling == "avg" else max_pool1d
        pooled = pool(received.flatten(1, 2), self.kernel, stride=1, padding=self.kernel // 2)
        return forced(pooled.view_as(received).mean(dim=2), 0, self.window)


@dataclass(frozen=True)
class TOVA(OneShot):
    """Keep the tokens that the last query attends to most, the same in all heads, as kvpress's TOVAPress.

    The original (arXiv 2401.06104) chooses anew at each token of the answer, and does not force the last token.
    """

    window = 1

    def scores(self, prompt: Prompt) -> Tensor:
        """Mean probability over all query heads; the last token has the highest plus 1."""
        received = window_attention(prompt)[:, :, :, -1, :-1].mean(dim=(1, 2))
        return forced(received[:, None].expand(-1, prompt.key.shape[1], -1), 0, 1)
