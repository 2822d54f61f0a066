"""Compressors: how the L key-value pairs of a partition become K pairs of the compact buffer.

A *selector* scores the L tokens and keeps the K highest; a *synthesizer* makes K new pairs. README.md says how to add
one. They see nothing but :class:`Partitions`.

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
    """Consecutive partitions of one sequence, each with its reference (the partition after it) at hand.

    Attributes:
        key: (B, H, P, L, D), rotated; ``value`` likewise.
        next_key: (B, H, P, L, D), keys of each partition's reference; ``next_value`` likewise.
        top_k: K, the pairs to make of each.
        first: ordinal of the first of them in its sequence.
        next_query: (B, H, G, P, w, D), rotated, the last queries of each partition's reference, as many as the
            compressor's ``window`` says; None where that is 0.
        start: position of the first token of the first of them in its sequence.
        rotary: the rotation that the keys have; None unless the compressor needs it.
        token_scores: (B, H, P, L), scores that came with the keys; None unless the compressor takes some.
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
        window: how many of a reference's last queries it is handed, at most L; an attribute of the class or a field.
        needs_rotary: whether it is handed ``Partitions.rotary``, which a rule has that a model was given.
        has_bias: whether it returns a third tensor, a bias (B, H, P, K) that is added to the logits of each compact
            pair, in at least float32; for those that make new pairs. slot_bias.py says what that costs.
        takes_scores: whether it chooses by scores that come with the keys, as channels (token_scores.py).
    """

    kind: ClassVar[str] = "compressors"
    window: int = 0
    needs_rotary: ClassVar[bool] = False
    has_bias: ClassVar[bool] = False
    takes_scores: ClassVar[bool] = False

    @abstractmethod
    def compress(self, partitions: Partitions) -> tuple[Tensor, ...]:
        """Compact keys and values, both (B, H, P, K, D) in the dtype of the partitions, with gradient to them."""

    @property
    def plain(self) -> Compressor:
        """What keeps the same pairs; differs from self only where the gradient is more than that of these pairs."""
        return self

    def for_layer(self, layer: int) -> Compressor:
        """The compressor of one layer; differs from self only where layers must not choose alike."""
        return self

    def for_heads(self, heads: tuple[int, ...]) -> Compressor:
        """The compressor of some of a layer's key-value heads; differs from self only where it counts the heads."""
        return self


class Selector(Compressor):
    """A compressor that keeps K of the L original pairs.

    Attributes:
        constant: whether the score depends on neither keys, values nor queries, and so has no gradient.
    """

    constant: ClassVar[bool] = False

    @property
    def plain(self) -> Selector:
        """As :class:`Compressor` has it."""
        return self

    def for_layer(self, layer: int) -> Selector:
        """As :class:`Compressor` has it."""
        return self

    def for_heads(self, heads: tuple[int, ...]) -> Selector:
        """As :class:`Compressor` has it."""
        return self

    @abstractmethod
    def score(self, partitions: Partitions) -> Tensor:
        """Scores (B, H, P, L), at least float32; the K highest are kept, ties go to the earlier token."""

    def rank(self, partitions: Partitions) -> Ranking:
        """The scores, and what orders the tokens: override it where scores that differ can round to the same number."""
        scores = self.score(partitions)
        return Ranking(scores, scores)

    @torch.no_grad()
    def keep(self, partitions: Partitions) -> tuple[Tensor, Tensor]:
        """Indices within the partition (B, H, P, K), ascending, and the scores (B, H, P, L)."""
        scores, order = self.rank(partitions)
        # A stable sort, because torch.topk promises nothing about ties.
        ranked = order.sort(dim=-1, descending=True, stable=True).indices
        return ranked[..., : partitions.top_k].sort(dim=-1).values, scores

    def compress(self, partitions: Partitions) -> tuple[Tensor, Tensor]:
        """Gather the kept pairs; the indices are constants for the gradient."""
        indices, _ = self.keep(partitions)
        return gather_kept(partitions.key, indices), gather_kept(partitions.value, indices)


class SpreadSelector(Selector):
    """Score a token by its spread over channels, normalised with the range of the next partition (LagKV, eq. 3-7).

    The score of its key and that of its value are added with weights; the fused kernels know this family.
    """

    @property
    @abstractmethod
    def weights(self) -> tuple[float, float]:
        """Of the key score and of the value score, >= 0 and not both 0."""

    def score(self, partitions: Partitions) -> Tensor:
        """The weighted sum."""
        return self.rank(partitions).scores

    def rank(self, partitions: Partitions) -> Ranking:
        """The weighted sum, and its logarithm up to a constant; a score of weight 0 is not computed."""
        pairs = (partitions.key, partitions.next_key), (partitions.value, partitions.next_value)
        used = [(pair, weight) for pair, weight in zip(pairs, self.weights, strict=True) if weight]
        return weighted_ranking([lag_relative_spread(*pair) for pair, _ in used], [weight for _, weight in used])


@dataclass(frozen=True)
class ValueWeighted(Compressor):
    """A compressor by the lag-relative score. Also ``model.lrsa.value_weight`` sets its weight.

    Args:
        value_weight: weight of the value score beside the key score, a finite number >= 0.
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

    Values are not rotated, so this score, unlike that of keys, does not fall along a partition.
    """

    @property
    def weights(self) -> tuple[float, float]:
        """0 and 1."""
        return 0.0, 1.0


@dataclass(frozen=True)
class ChunkWise(ValueWeighted, Selector):
    """Keep runs of consecutive tokens, by the mean of their scores, so that words and names stay whole.

    A partition is cut into runs of ``size`` tokens, the last of which may be shorter. The best runs are kept as long as
    K tokens hold them whole, and of the next one its first tokens, so that there are K.

    Args:
        size: tokens of a run (>= 1); 1 keeps what the scores alone keep.
        values_only: score as :class:`ValueRelative` instead of :class:`LagRelative`.
        value_weight: of :class:`LagRelative`.

    Source: ChunkKV (arXiv 2502.00299), with the lag-relative score in the place of its own.
    """

    size: int = 16
    values_only: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_setting("size", self.size, is_integer(self.size) and self.size >= 1, "an integer >= 1")

    def score(self, partitions: Partitions) -> Tensor:
        """The mean over the token's run; of equal scores the earlier is kept, so that runs are kept whole."""
        return self.rank(partitions).scores

    def rank(self, partitions: Partitions) -> Ranking:
        """The mean over the token's run, and its logarithm up to a constant of the partition."""
        of_tokens = ValueRelative() if self.values_only else LagRelative(value_weight=self.value_weight)
        scores, order = of_tokens.rank(partitions)
        highest = for_tokens(runs_of(order, self.size, -math.inf).amax(dim=-1), order, self.size)
        log_means = highest + run_means((order - highest).exp(), self.size).log()
        return Ranking(run_means(scores, self.size), log_means)


@dataclass(frozen=True)
class LagRelativeTail(ValueWeighted, Selector):
    """Keep the last tokens of each partition, and of the others the best by the score of :class:`LagRelative`.

    Ours: keys are scored after their rotation, which favours early tokens; this gives the late ones a share.

    Args:
        tail: share of K that goes to the last tokens, 0 to 1: they are tail K, rounded to the nearest integer, a half
            up.
        value_weight: of :class:`LagRelative`.
    """

    tail: float = 0.25

    def __post_init__(self) -> None:
        super().__post_init__()
        check_setting("tail", self.tail, is_weight(self.tail) and self.tail <= 1, "a number from 0 to 1")

    def last(self, top_k: int) -> int:
        """How many of K are the last tokens."""
        return math.floor(self.tail * top_k + 0.5)

    def score(self, partitions: Partitions) -> Tensor:
        """That of :class:`LagRelative`, also of the last tokens."""
        return self.rank(partitions).scores

    def rank(self, partitions: Partitions) -> Ranking:
        """The score, and the order of :class:`LagRelative` with the last tokens in front of all others."""
        scores, order = LagRelative(value_weight=self.value_weight).rank(partitions)
        lag = order.shape[-1]
        always = torch.arange(lag, device=order.device) >= lag - self.last(partitions.top_k)
        return Ranking(scores, order.masked_fill(always, math.inf))


@dataclass(frozen=True)
class RandomTokens(Selector):
    """Keep K tokens at random: a hash of seed, head, partition and token, so each device and split agrees.

    Args:
        seed: an integer; each layer of a model derives its own.
    """

    constant: ClassVar[bool] = True
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the seed: the hash would only show when tokens are kept."""
        check_setting("seed", self.seed, is_integer(self.seed), "an integer")

    def score(self, partitions: Partitions) -> Tensor:
        """Uniform in [0, 1), the same for every row of the batch."""
        batch, heads, count, lag, _ = partitions.key.shape
        head = self.ordinals(heads, partitions.key.device).view(1, heads, 1, 1)
        ordinal = torch.arange(count, device=partitions.key.device).view(1, 1, count, 1) + partitions.first
        token = torch.arange(lag, device=partitions.key.device).view(1, 1, 1, lag)
        return token_hash(self.seed, head, ordinal, token).expand(batch, -1, -1, -1)

    def for_layer(self, layer: int) -> RandomTokens:
        """Another seed for each layer: otherwise all layers would lose the same tokens."""
        return dataclasses.replace(self, seed=self.seed * 1_000_003 + layer)

    def for_heads(self, heads: tuple[int, ...]) -> RandomTokens:
        """What each head chooses is the same, whichever others are beside it."""
        return _RandomOfHeads(self.seed, heads)

    def ordinals(self, heads: int, device: torch.device) -> Tensor:
        """The places (H,) of the heads in the layer."""
        return torch.arange(heads, device=device)


@dataclass(frozen=True)
class _RandomOfHeads(RandomTokens):
    """That of some heads of a layer."""

    heads: tuple[int, ...] = ()

    def ordinals(self, heads: int, device: torch.device) -> Tensor:
        return torch.tensor(self.heads, device=device)


@dataclass(frozen=True)
class KeyDiff(Selector):
    """Keep the keys that are least like the others of their partition.

    The score is KeyDiff's (arXiv 2504.15364). Ours is that each partition chooses among its own keys, and so trains.
    The systems KeyDiff and KeyDiffBlocks cut a prompt, as published.
    """

    def score(self, partitions: Partitions) -> Tensor:
        """Minus the cosine between the key and the mean of the partition's keys, each at length 1."""
        keys = normalize(partitions.key.to(torch.promote_types(partitions.key.dtype, torch.float32)), dim=-1)
        return -cosine_similarity(keys, keys.mean(dim=-2, keepdim=True), dim=-1)


@dataclass(frozen=True)
class Recency(Selector):
    """Keep the last K tokens of each partition."""

    constant: ClassVar[bool] = True
    shared_heads: ClassVar[bool] = True

    def score(self, partitions: Partitions) -> Tensor:
        """The token's place in the partition."""
        places = torch.arange(partitions.key.shape[-2], device=partitions.key.device)
        return places.float().expand(partitions.key.shape[:-1])


@dataclass(frozen=True)
class Strided(Selector):
    """Keep every L/K-th token: the places floor(i L / K)."""

    constant: ClassVar[bool] = True
    shared_heads: ClassVar[bool] = True

    def score(self, partitions: Partitions) -> Tensor:
        """One at the K places, zero elsewhere."""
        lag, kept = partitions.key.shape[-2], partitions.top_k
        scores = torch.zeros(lag, device=partitions.key.device)
        scores[torch.arange(kept, device=scores.device) * lag // max(kept, 1)] = 1.0
        return scores.expand(partitions.key.shape[:-1])


@dataclass(frozen=True)
class MeanPool(Compressor):
    """Average groups of L/K consecutive keys and values: K new pairs, each with gradient to its whole group."""

    def compress(self, partitions: Partitions) -> tuple[Tensor, Tensor]:
        """Token l belongs to group floor(l K / L); where K does not divide L, group sizes differ by at most one."""
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
