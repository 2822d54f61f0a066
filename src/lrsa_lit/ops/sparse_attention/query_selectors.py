"""Selectors that score a partition by the attention which the last queries of its reference pay to it.

All these queries stand before every query that sees the result, so what trains with them is causal.

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
    """The attention (…, L) that tokens get among themselves, a mean over queries and the heads of a group.

    Args:
        key: (B, H, P, L, D).
        query: (B, H, G, P, w, D); each sees all keys of its partition and nothing else. Products are scaled by
            D ** -0.5, also in models that scale their own otherwise.
    """
    dtype = torch.promote_types(key.dtype, torch.float32)
    rows = query.transpose(2, 3).flatten(3, 4).to(dtype)  # (B, H, P, G w, D)
    scores = rows @ key.to(dtype).transpose(-1, -2) * key.shape[-1] ** -0.5
    received: Tensor = scores.softmax(dim=-1).mean(dim=-2)
    return received


@dataclass(frozen=True)
class QueryAttention(Selector):
    """Keep the tokens that the last queries of the next partition attend to most.

    The score is SnapKV's (arXiv 2404.14469), with the mean over queries and group that kvpress takes. Ours is that it
    chooses in each partition, among its L tokens alone, and so trains; SnapKV cuts a whole prompt once.

    Args:
        window: queries of the reference that score (w, 1 to L).
        kernel: scores are averaged over so many neighbouring tokens of the partition, beyond which they count as 0;
            an odd number, 1 for none. SnapKV takes 5.
        shared_heads: all key-value heads keep the same tokens, those of the highest sums over heads.
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
        """Mean probability; a sum of means where heads share."""
        assert partitions.next_query is not None
        return self.pooled(attention_received(partitions.key, partitions.next_query))

    def pooled(self, received: Tensor) -> Tensor:
        """The scores (B, H, P, L) of tokens that have received so much attention."""
        if self.kernel > 1:
            side = self.kernel // 2
            received = pad(received, (side, side)).unfold(-1, self.kernel, 1).mean(dim=-1)
        return received.sum(dim=1, keepdim=True).expand_as(received) if self.shared_heads else received


@dataclass(frozen=True)
class QueryRuns(QueryAttention):
    """Keep runs of consecutive tokens by the mean of what :class:`QueryAttention` gives them.

    Runs and their scores are ChunkKV's (arXiv 2502.00299). Ours is that a partition chooses among its own runs, as
    :class:`ChunkWise` does: the best are kept whole as long as K tokens hold them, and of the next one its first
    tokens, so that there are K. ChunkKV cuts a whole prompt once, to whole chunks.

    Args:
        size: tokens of a run (>= 1); the last of a partition may be shorter. ChunkKV takes 10 to 20.
        window: of :class:`QueryAttention`; ChunkKV takes 4 to 32.
        kernel: of :class:`QueryAttention`.
        shared_heads: all key-value heads keep the same runs, as kvpress has it.
    """

    size: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        check_setting("size", self.size, is_integer(self.size) and self.size >= 1, "an integer >= 1")

    def pooled(self, received: Tensor) -> Tensor:
        """The mean over the token's run; of equal scores the earlier is kept, so that runs are kept whole."""
        return run_means(super().pooled(received), self.size)
