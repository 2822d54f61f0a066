"""Selectors that score a partition's tokens by the attention from the last queries of its reference.

These queries come before every query that sees the kept tokens, so training with these selectors is causal.

Dimensions: B batch, H key-value heads, G query heads of each, P partitions, L lag_size, D head_dim, w window.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from lrsa_lit.bounds import check_setting, is_integer
from lrsa_lit.ops.sparse_attention.compressors import Partitions, Selector
from lrsa_lit.ops.sparse_attention.scoring import run_means


def attention_received(key: Tensor, query: Tensor) -> Tensor:
    """The attention probability (B, H, P, L) that each token receives, mean over queries and the heads of a group.

    Args:
        key: (B, H, P, L, D).
        query: (B, H, G, P, w, D). Each query attends to all keys of its partition and to no others. Logits are scaled
            by D ** -0.5, even if the model's own attention uses another scale.
    """
    dtype = torch.promote_types(key.dtype, torch.float32)
    rows = query.transpose(2, 3).flatten(3, 4).to(dtype)  # (B, H, P, G w, D)
    scores = rows @ key.to(dtype).transpose(-1, -2) * key.shape[-1] ** -0.5
    received: Tensor = scores.softmax(dim=-1).mean(dim=-2)
    return received


@dataclass(frozen=True)
class QueryAttention(Selector):
    """Keep the tokens that the last queries of the next partition attend to most.

    The score is SnapKV's (arXiv 2404.14469), with kvpress's mean over queries and group. SnapKV selects once from the
    whole prompt; this selects among the L tokens of each partition, so models can be trained with it.

    Args:
        window: how many of the reference's last queries score (w, 1 to L).
        kernel: tokens to average scores over, within the partition, padded with 0; an odd number. 1 does not average;
            SnapKV uses 5.
        shared_heads: keep the same tokens in all key-value heads, those with the highest sums over heads.
    """

    window: int = 16
    kernel: int = 1
    shared_heads: bool = False

    def __post_init__(self) -> None:
        check_setting("window", self.window, is_integer(self.window) and self.window >= 1, "an integer >= 1")
        odd = is_integer(self.kernel) and self.kernel >= 1 and self.kernel % 2 == 1
        check_setting("kernel", self.kernel, odd, "an odd integer >= 1")
        check_setting("shared_heads", self.shared_heads, isinstance(self.shared_heads, bool), "true or false")

    def score(self, partitions: Partitions) -> Tensor:
        """The mean probability, or its sum over the heads if they share their tokens."""
        assert partitions.next_query is not None
        return self.pooled(attention_received(partitions.key, partitions.next_query))

    def pooled(self, received: Tensor) -> Tensor:
        """The scores (B, H, P, L), from the attention ``received`` by each token."""
        if self.kernel > 1:
            side = self.kernel // 2
            received = pad(received, (side, side)).unfold(-1, self.kernel, 1).mean(dim=-1)
        return received.sum(dim=1, keepdim=True).expand_as(received) if self.shared_heads else received


@dataclass(frozen=True)
class QueryRuns(QueryAttention):
    """Keep the runs of consecutive tokens with the highest mean :class:`QueryAttention` score.

    Runs and their scores are ChunkKV's (arXiv 2502.00299). ChunkKV selects whole chunks once from the whole prompt.
    Here each partition chooses among its own runs, as in :class:`ChunkWise`: the best runs are kept whole as long as
    they fit into K tokens, and the first tokens of the next run fill up the rest.

    Args:
        size: tokens in a run (>= 1); the last run of a partition may be shorter. ChunkKV uses 10 to 20.
        window: as in :class:`QueryAttention`; ChunkKV uses 4 to 32.
        kernel: as in :class:`QueryAttention`.
        shared_heads: keep the same runs in all key-value heads, as kvpress does.
    """

    size: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        check_setting("size", self.size, is_integer(self.size) and self.size >= 1, "an integer >= 1")

    def pooled(self, received: Tensor) -> Tensor:
        """The mean over the token's run. Of equal scores the earlier is kept, so runs stay whole."""
        return run_means(super().pooled(received), self.size)
