"""LagKV as in kvpress: one-shot selection by ranks.

Dimensions: B batch, H key-value heads, T tokens of the prompt, P scored partitions, S sink_size, L lag_size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from lrsa_lit.bounds import check_integers
from lrsa_lit.ops.sparse_attention.scoring import Ranking, lag_relative_spread, weighted_ranking
from lrsa_lit.systems.one_shot import OneShot, Prompt


@dataclass(frozen=True)
class LagKVPress(OneShot):
    """Keep the sinks, the tail, and the tokens with the highest ranks in their partitions (kvpress's LagKVPress).

    The published cache (arXiv 2504.04704), which is this project's rule, keeps K tokens of each partition besides sinks
    and tail. Here sinks and tail count among the n kept pairs, and one ranking over all partitions decides. If n does
    not divide evenly, the earlier partitions keep one more. A constant channel counts as 0, where kvpress yields NaN.

    Args:
        sink_size: number of first tokens, which have the highest score.
        lag_size: tokens in a partition. With fewer than sink_size + 2 lag_size tokens in all, the last ones are kept.
        cross_scoring: compare scores instead of ranks across partitions.
    """

    sink_size: int = 4
    lag_size: int = 128
    cross_scoring: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integers(self, 0, "sink_size")
        check_integers(self, 2, "lag_size")

    def floor(self, tokens: int) -> int:
        """The sinks and the tail, which is the last whole partition and the tokens after it."""
        behind = tokens - self.sink_size
        return super().floor(tokens) + (self.lag_size + behind % self.lag_size if behind >= 2 * self.lag_size else 0)

    def scores(self, prompt: Prompt) -> Tensor:
        """Scores below 1 in partitions that have a successor; 1 before and after these partitions."""
        sink, lag, behind = self.sink_size, self.lag_size, prompt.tokens - self.sink_size
        if behind < 2 * lag:
            scores = torch.arange(max(behind, 0), dtype=torch.float64, device=prompt.key.device) / max(behind, 1)
            return pad(scores, (prompt.tokens - len(scores), 0), value=1.0).expand(prompt.key.shape[:3])
        whole = slice(sink, sink + behind // lag * lag)
        parts = [x[:, :, whole].unflatten(2, (-1, lag)) for x in (prompt.key, prompt.value)]
        spreads = [lag_relative_spread(part[:, :, :-1], part[:, :, 1:]) for part in parts]
        scores = self._of_partitions(weighted_ranking(spreads, (1.0, 1.0))).flatten(2, 3)
        return pad(scores, (sink, behind - scores.shape[2]), value=1.0)

    def _of_partitions(self, ranking: Ranking) -> Tensor:
        """(B, H, P, L): the mean of the scores of key and value, or its rank / L."""
        if self.cross_scoring:
            return ranking.scores / 2
        order = ranking.order.argsort(dim=-1, stable=True)
        ranks = torch.arange(self.lag_size, dtype=ranking.scores.dtype, device=order.device) / self.lag_size
        return torch.zeros_like(ranking.scores).scatter(-1, order, ranks.expand_as(order))
