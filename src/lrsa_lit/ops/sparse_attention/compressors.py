"""Compressors: how the L key-value pairs of a partition become K pairs of the compact buffer.

A *selector* scores the L tokens and keeps the K highest; a *synthesizer* makes K new pairs. Both see only
:class:`Partitions`. README.md describes how to add one.

Dimensions: B batch, H key-value heads, G query heads of each, P partitions, L lag_size, K top_k, D head_dim, w window.
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from lrsa_lit.bounds import check_setting, is_integer, is_weight
from lrsa_lit.from_settings import FromSettings
from lrsa_lit.ops.sparse_attention.rotary import Rotary
from lrsa_lit.ops.sparse_attention.scoring import (
    Ranking,
    for_tokens,
    lag_relative_spread,
    run_means,
    runs_of,
    token_hash,
    weighted_ranking,
)


@dataclass(frozen=True)
class Partitions:
    """Consecutive partitions of one sequence, each with its reference (the next partition).

    Attributes:
        key: (B, H, P, L, D), rotated; ``value`` likewise.
        next_key: (B, H, P, L, D), keys of each partition's reference; ``next_value`` likewise.
        top_k: K, the number of pairs to make of each partition.
        first: index of the first of these partitions in its sequence.
        next_query: (B, H, G, P, w, D), rotated, the last w queries of each partition's reference, w being the
            compressor's ``window``; None if w = 0.
        start: position in its sequence of the first token of these partitions.
        rotary: the rotation of the keys; None unless the compressor needs it.
        token_scores: (B, H, P, L), scores that came with the keys; None unless the compressor takes them.
    """

    key: Tensor
    value: Tensor
    next_key: Tensor
    next_value: Tensor
    top_k: int
    first: int = 0
    next_query: Tensor | None = None
    start: int = 0
    rotary: Rotary | None = None
    token_scores: Tensor | None = None


class Compressor(FromSettings, ABC):
    """Maps each partition to K key-value pairs. Subclasses are frozen dataclasses, so that they compare and hash.

    Attributes:
        window: how many of a reference's last queries it needs, at most L. A class attribute or a field.
        needs_rotary: whether it needs ``Partitions.rotary``; the rule of a model has it.
        has_bias: whether it returns a third tensor: a bias (B, H, P, K), at least float32, that is added to the logits
            of each compact pair. Only for compressors that make new pairs; slot_bias.py states the cost.
        takes_scores: whether it chooses by scores that come with the keys, as extra channels (token_scores.py).
        ignores_place: whether it ignores ``Partitions.first`` and ``start``, so that partitions of several sequences
            can be compressed in one call.
    """

    kind: ClassVar[str] = "compressors"
    window: int = 0
    needs_rotary: ClassVar[bool] = False
    has_bias: ClassVar[bool] = False
    takes_scores: ClassVar[bool] = False
    ignores_place: ClassVar[bool] = False

    @abstractmethod
    def compress(self, partitions: Partitions) -> tuple[Tensor, ...]:
        """Compact keys and values, both (B, H, P, K, D) in the dtype of the partitions, differentiable in them."""

    @property
    def plain(self) -> Compressor:
        """A compressor that keeps the same pairs without an extra gradient; self unless this one adds a gradient."""
        return self

    def for_layer(self, layer: int) -> Compressor:
        """The compressor of one layer; self unless layers must choose differently."""
        return self

    def for_heads(self, heads: tuple[int, ...]) -> Compressor:
        """The compressor of some of a layer's key-value heads; self unless the choice depends on the head's index."""
        return self


class Selector(Compressor):
    """A compressor that keeps K of the L original pairs.

    Attributes:
        constant: whether the score ignores keys, values and queries, and so has no gradient.
    """

    constant: ClassVar[bool] = False

    @property
    def plain(self) -> Selector:
        """See :class:`Compressor`."""
        return self

    def for_layer(self, layer: int) -> Selector:
        """See :class:`Compressor`."""
        return self

    def for_heads(self, heads: tuple[int, ...]) -> Selector:
        """See :class:`Compressor`."""
        return self

    @abstractmethod
    def score(self, partitions: Partitions) -> Tensor:
        """Scores (B, H, P, L), at least float32; the K highest are kept, ties go to the earlier token."""

    def rank(self, partitions: Partitions) -> Ranking:
        """The scores and the order of the tokens. Override it if different scores can round to the same number."""
        scores = self.score(partitions)
        return Ranking(scores, scores)

    @torch.no_grad()
    def keep(self, partitions: Partitions) -> tuple[Tensor, Tensor]:
        """The kept indices within each partition (B, H, P, K), ascending, and the scores (B, H, P, L)."""
        scores, order = self.rank(partitions)
        # A stable sort, because torch.topk does not define the order of ties.
        ranked = order.sort(dim=-1, descending=True, stable=True).indices
        return ranked[..., : partitions.top_k].sort(dim=-1).values, scores

    def compress(self, partitions: Partitions) -> tuple[Tensor, Tensor]:
        """Gather the kept pairs; the indices are constants for the gradient."""
        indices, _ = self.keep(partitions)
        return gather_kept(partitions.key, indices), gather_kept(partitions.value, indices)


class SpreadSelector(Selector):
    """Score a token by its spread over channels, normalised by the range of the next partition (LagKV, eq. 3-7).

    The score is a weighted sum of the key's and the value's. The fused kernels support this family.
    """

    @property
    @abstractmethod
    def weights(self) -> tuple[float, float]:
        """The weights of the key score and of the value score, >= 0 and not both 0."""

    def score(self, partitions: Partitions) -> Tensor:
        """The weighted sum."""
        return self.rank(partitions).scores

    def rank(self, partitions: Partitions) -> Ranking:
        """The weighted sum, and its logarithm up to a constant. A score with weight 0 is not computed."""
        pairs = (partitions.key, partitions.next_key), (partitions.value, partitions.next_value)
        used = [(pair, weight) for pair, weight in zip(pairs, self.weights, strict=True) if weight]
        return weighted_ranking([lag_relative_spread(*pair) for pair, _ in used], [weight for _, weight in used])


@dataclass(frozen=True)
class ValueWeighted(Compressor):
    """A compressor that uses the lag-relative score. ``model.lrsa.value_weight`` sets its weight, too.

    Args:
        value_weight: weight of the value score relative to the key score, a finite number >= 0.
    """

    value_weight: float = field(default=1.0, kw_only=True)

    def __post_init__(self) -> None:
        check_setting("value_weight", self.value_weight, is_weight(self.value_weight), "a finite number >= 0")


@dataclass(frozen=True)
class LagRelative(ValueWeighted, SpreadSelector):
    """The key score plus ``value_weight`` times the value score (LagKV, eq. 8)."""

    @property
    def weights(self) -> tuple[float, float]:
        """1 and ``value_weight``."""
        return 1.0, self.value_weight


@dataclass(frozen=True)
class ValueRelative(SpreadSelector):
    """The value score alone; the key score alone is :class:`LagRelative` at weight 0.

    Values are not rotated, so this score does not decrease along a partition, as the key score does.
    """

    @property
    def weights(self) -> tuple[float, float]:
        """0 and 1."""
        return 0.0, 1.0


@dataclass(frozen=True)
class ChunkWise(ValueWeighted, Selector):
    """Keep the runs of consecutive tokens with the highest mean scores, so that words and names stay whole.

    A partition is cut into runs of ``size`` tokens; the last may be shorter. The best runs are kept whole as long as
    they fit into K tokens. The first tokens of the next run fill up the rest.

    Args:
        size: tokens in a run (>= 1); 1 keeps the same tokens as the scores alone.
        values_only: score as :class:`ValueRelative` instead of :class:`LagRelative`.
        value_weight: as in :class:`LagRelative`.

    Source: ChunkKV (arXiv 2502.00299), with the lag-relative score instead of its own.
    """

    size: int = 16
    values_only: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_setting("size", self.size, is_integer(self.size) and self.size >= 1, "an integer >= 1")

    def score(self, partitions: Partitions) -> Tensor:
        """The mean over the token's run. Of equal scores the earlier is kept, so runs stay whole."""
        return self.rank(partitions).scores

    def rank(self, partitions: Partitions) -> Ranking:
        """The mean over the token's run, and its logarithm up to a constant per partition."""
        of_tokens = ValueRelative() if self.values_only else LagRelative(value_weight=self.value_weight)
        scores, order = of_tokens.rank(partitions)
        highest = for_tokens(runs_of(order, self.size, -math.inf).amax(dim=-1), order, self.size)
        log_means = highest + run_means((order - highest).exp(), self.size).log()
        return Ranking(run_means(scores, self.size), log_means)


@dataclass(frozen=True)
class LagRelativeTail(ValueWeighted, Selector):
    """Keep the last tokens of each partition, and fill up K with the best others by the :class:`LagRelative` score.

    Our own variant: keys are scored after their rotation, which favours early tokens. This reserves a share for the
    late ones.

    Args:
        tail: share of K that goes to the last tokens, 0 to 1. ``tail * K`` is rounded to the nearest integer, half up.
        value_weight: as in :class:`LagRelative`.
    """

    tail: float = 0.25

    def __post_init__(self) -> None:
        super().__post_init__()
        check_setting("tail", self.tail, is_weight(self.tail) and self.tail <= 1, "a number from 0 to 1")

    def last(self, top_k: int) -> int:
        """How many of the K kept tokens are the last ones."""
        return math.floor(self.tail * top_k + 0.5)

    def score(self, partitions: Partitions) -> Tensor:
        """The score of :class:`LagRelative`, also for the last tokens."""
        return self.rank(partitions).scores

    def rank(self, partitions: Partitions) -> Ranking:
        """The scores of :class:`LagRelative`, and its order with the last tokens before all others."""
        scores, order = LagRelative(value_weight=self.value_weight).rank(partitions)
        lag = order.shape[-1]
        always = torch.arange(lag, device=order.device) >= lag - self.last(partitions.top_k)
        return Ranking(scores, order.masked_fill(always, math.inf))


@dataclass(frozen=True)
class RandomTokens(Selector):
    """Keep K random tokens of each partition, the same on every device and for any split into calls.

    The choice is a hash of the seed, head, partition and token.

    Args:
        seed: an integer; each layer of a model derives its own seed from it.
    """

    constant: ClassVar[bool] = True
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the seed now; otherwise a bad one would fail only when tokens are selected."""
        check_setting("seed", self.seed, is_integer(self.seed), "an integer")

    def score(self, partitions: Partitions) -> Tensor:
        """Uniform in [0, 1), the same for every row of the batch."""
        batch, heads, count, lag, _ = partitions.key.shape
        head = self.ordinals(heads, partitions.key.device).view(1, heads, 1, 1)
        ordinal = torch.arange(count, device=partitions.key.device).view(1, 1, count, 1) + partitions.first
        token = torch.arange(lag, device=partitions.key.device).view(1, 1, 1, lag)
        return token_hash(self.seed, head, ordinal, token).expand(batch, -1, -1, -1)

    def for_layer(self, layer: int) -> RandomTokens:
        """A compressor with another seed, so that layers do not all drop the same tokens."""
        return dataclasses.replace(self, seed=self.seed * 1_000_003 + layer)

    def for_heads(self, heads: tuple[int, ...]) -> RandomTokens:
        """A compressor by which each head chooses the same tokens as among all heads."""
        return _RandomOfHeads(self.seed, heads)

    def ordinals(self, heads: int, device: torch.device) -> Tensor:
        """The indices (H,) of the heads in the layer."""
        return torch.arange(heads, device=device)


@dataclass(frozen=True)
class _RandomOfHeads(RandomTokens):
    """:class:`RandomTokens` for some heads of a layer."""

    heads: tuple[int, ...] = ()

    def ordinals(self, heads: int, device: torch.device) -> Tensor:
        return torch.tensor(self.heads, device=device)


@dataclass(frozen=True)
class KeyDiff(Selector):
    """Keep the keys that are least similar to the others of their partition.

    The score is KeyDiff's (arXiv 2504.15364). Here each partition chooses among its own keys, so models can be trained
    with it. The systems KeyDiff and KeyDiffBlocks select from the whole prompt, as published.
    """

    def score(self, partitions: Partitions) -> Tensor:
        """Minus the cosine between the key and the mean of the partition's keys, each scaled to length 1."""
        keys = normalize(partitions.key.to(torch.promote_types(partitions.key.dtype, torch.float32)), dim=-1)
        return -cosine_similarity(keys, keys.mean(dim=-2, keepdim=True), dim=-1)


@dataclass(frozen=True)
class Recency(Selector):
    """Keep the last K tokens of each partition."""

    constant: ClassVar[bool] = True
    shared_heads: ClassVar[bool] = True

    def score(self, partitions: Partitions) -> Tensor:
        """The token's index in the partition."""
        places = torch.arange(partitions.key.shape[-2], device=partitions.key.device)
        return places.float().expand(partitions.key.shape[:-1])


@dataclass(frozen=True)
class Strided(Selector):
    """Keep every L/K-th token, at the indices floor(i L / K)."""

    constant: ClassVar[bool] = True
    shared_heads: ClassVar[bool] = True

    def score(self, partitions: Partitions) -> Tensor:
        """1 at these K indices, 0 elsewhere."""
        lag, kept = partitions.key.shape[-2], partitions.top_k
        scores = torch.zeros(lag, device=partitions.key.device)
        scores[torch.arange(kept, device=scores.device) * lag // max(kept, 1)] = 1.0
        return scores.expand(partitions.key.shape[:-1])


@dataclass(frozen=True)
class MeanPool(Compressor):
    """Average groups of L/K consecutive keys and values into K new pairs; the gradient reaches the whole group."""

    ignores_place: ClassVar[bool] = True

    def compress(self, partitions: Partitions) -> tuple[Tensor, Tensor]:
        """Average the groups; token l belongs to group floor(l K / L), and group sizes differ by at most one."""
        lag, kept = partitions.key.shape[-2], partitions.top_k
        group = torch.arange(lag, device=partitions.key.device) * kept // lag
        member = group == torch.arange(kept, device=group.device)[:, None]  # (K, L)
        dtype = torch.promote_types(partitions.key.dtype, torch.float32)
        weights = member.to(dtype) / member.sum(dim=-1, keepdim=True)
        pooled_key, pooled_value = (weights @ tokens.to(dtype) for tokens in (partitions.key, partitions.value))
        return pooled_key.to(partitions.key.dtype), pooled_value.to(partitions.value.dtype)


def gather_kept(tokens: Tensor, indices: Tensor) -> Tensor:
    """Rows ``indices`` (…, K) of ``tokens`` (…, L, D) -> (…, K, D), differentiable in the tokens."""
    return torch.take_along_dim(tokens, indices.unsqueeze(-1), dim=-2)
