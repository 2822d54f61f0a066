"""Distributions of the next token: over the vocabulary, or over the n most likely tokens and all others as one.

Dimensions: R positions, V vocabulary, n most likely tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import log_softmax


@dataclass(frozen=True)
class Distribution:
    """A teacher's distributions at R positions.

    Attributes:
        logs: (R, V) log-probabilities. With ``tokens``, (R, n + 1); the last one is of all other tokens together.
        width: V, the size of the vocabulary.
        tokens: (R, n) int64, the most likely tokens in descending order; None if all tokens are separate.
    """

    logs: Tensor
    width: int
    tokens: Tensor | None = None

    @classmethod
    def of(cls, logits: Tensor, top_n: int | None = None) -> Distribution:
        """The distribution of logits (R, V), over the ``top_n`` most likely tokens and the rest, if there is one."""
        width = logits.shape[1]
        if top_n is None or top_n >= width:
            return cls(log_softmax(logits, dim=1), width)
        return cls.most_likely(logits, top_n)

    @classmethod
    def most_likely(cls, logits: Tensor, n: int) -> Distribution:
        """The distribution of logits (R, V), over the n <= V most likely tokens and the rest."""
        logs, tokens = log_softmax(logits, dim=1).topk(n, dim=1)
        return cls(_with_rest(logs), logits.shape[1], tokens)

    def bins_of(self, logits: Tensor) -> Tensor:
        """The log-probabilities of other logits (R, >= V) for the same tokens as ``logs``.

        Columns beyond V are padding: models of one family pad their vocabulary to different multiples.
        """
        logs = log_softmax(logits[:, : self.width], dim=1)
        return logs if self.tokens is None else _with_rest(logs.gather(1, self.tokens))


def _with_rest(logs: Tensor) -> Tensor:
    """(R, n + 1): append the logarithm of the remaining probability."""
    rest = -torch.expm1(torch.logsumexp(logs, dim=1, keepdim=True))
    return torch.cat([logs, rest.clamp_min(torch.finfo(logs.dtype).tiny).log()], dim=1)
