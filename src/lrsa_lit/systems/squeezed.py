"""Squeezed Attention (arXiv 2411.09688): keep the whole prompt, but let later tokens read only relevant clusters.

Dimensions: B batch, H key-value heads, G query heads of each, N new tokens, n clustered keys, K clusters, D head_dim.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from lrsa_lit.bounds import check_setting, is_integer, is_weight
from lrsa_lit.ops.sdpa import sdpa
from lrsa_lit.ops.sparse_attention import Impl, KeyValueStream, Stream, fetch_numbers
from lrsa_lit.ops.sparse_attention.clustering import cluster_labels, cluster_sums
from lrsa_lit.ops.sparse_attention.compressors import gather_kept
from lrsa_lit.systems.clusters import Level
from lrsa_lit.systems.squeezed_rows import RowsTogether, looked_up_of
from lrsa_lit.systems.system import Place, System

_NUMBERS = 1 << 26
"""The most numbers in the keys of layers that are clustered at once."""


def labels_of(keys: Tensor, count: int, iterations: int) -> Tensor:
    """(B, H, n) int64: the cluster of each key (B, H, n, D). The paper initialises k-means with k-means++ instead."""
    return cluster_labels(keys, count, iterations, until_settled=True)


def centroids(keys: Tensor, labels: Tensor, count: int) -> Tensor:
    """(B, H, K, D): the mean of the raw keys (B, H, n, D) of each cluster, in the keys' dtype; zeros if empty."""
    sums, size = cluster_sums(keys.to(torch.promote_types(keys.dtype, torch.float32)), labels, count)
    return (sums / size.clamp(min=1)).to(keys.dtype)


@dataclass(frozen=True)
class SqueezedAttention(System):
    """Read only the keys of clusters whose estimated attention exceeds a threshold, one for all layers and heads.

    The cache holds everything; only reading is saved. Clusters are made when the prompt ends, and the queries of its
    last tokens set the threshold. Later tokens (a question, the answer) are compared with the centroids first: the
    tokens of one call by their mean, so single tokens individually. The last tokens of the prompt and all later ones
    are always read. The paper does not cover grouped heads; we average over the group.

    Args:
        sparsity: p, the quantile of the scores that is the threshold: about the share of keys that are not read.
        observed: number of last tokens of the prompt, which set the threshold and are not clustered.
        clusters: number of clusters, as a share of the clustered tokens.
        coarse: number of clusters of an additional first level, which clusters the centroids, as a share of the
            clustered tokens; null for one level. The paper uses 0.01.
        coarse_sparsity: p of the first level.
        iterations: the most iterations of k-means.
        question: whether the clustered prompt includes the first turn's question, instead of the context alone.
    """

    sparsity: float = 0.7
    observed: int = 100
    clusters: float = 0.05
    coarse: float | None = None
    coarse_sparsity: float = 0.5
    iterations: int = 300
    question: bool = field(default=False, kw_only=True)
    answers_by_token: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Check each bound once."""
        for name in ("sparsity", "coarse_sparsity"):
            value = getattr(self, name)
            check_setting(name, value, is_weight(value) and value < 1, "a number from 0 to below 1")
        for name in ("observed", "iterations"):
            value = getattr(self, name)
            check_setting(name, value, is_integer(value) and value >= 1, "an integer >= 1")
        share = is_weight(self.clusters) and 0 < self.clusters <= 1
        check_setting("clusters", self.clusters, share, "a number above 0 and at most 1")
        check_setting("question", self.question, isinstance(self.question, bool), "true or false")
        coarse = self.coarse is None or (is_weight(self.coarse) and 0 < self.coarse <= self.clusters)
        check_setting(
            "coarse", self.coarse, coarse, f"a number above 0 and at most clusters ({self.clusters}), or null"
        )

    def stream(self, place: Place, impl: Impl) -> Stream:
        """See :class:`System`."""
        return SqueezedStream(self, impl)

    @torch.no_grad()
    def end_prompt(self, streams: Sequence[Stream]) -> None:
        """Cluster each layer's keys, and compute the thresholds over all layers."""
        fresh = [stream for stream in streams if isinstance(stream, SqueezedStream) and stream.levels is None]
        for some in _together(fresh):
            self._cluster(some)
        if not any(stream.levels for stream in fresh):
            return
        shares = (self.sparsity,) if self.coarse is None else (self.coarse_sparsity, self.sparsity)
        for number, share in enumerate(shares):
            scores = [stream.observed_scores(number).flatten(1) for stream in fresh]
            threshold = quantile(torch.cat(scores, dim=1), share)
            for stream in fresh:
                stream.thresholds.append(threshold)

    def _cluster(self, streams: Sequence[SqueezedStream]) -> None:
        """Cluster all tokens except the last ``observed``, in several layers at once."""
        keys = torch.cat([stream.clustered for stream in streams])
        levels = self._levels(keys) if keys.shape[2] else []
        parts = [zip(*(part.chunk(len(streams)) for part in level), strict=True) for level in levels]
        for stream in streams:
            stream.index([Level(*next(part)) for part in parts])

    def _levels(self, keys: Tensor) -> list[Level]:
        """The clusterings of keys (B, H, n, D), coarse first."""
        count = keys.shape[2]
        fine = max(1, int(self.clusters * count))
        labels = labels_of(keys, fine, self.iterations)
        levels = [Level(labels, centroids(keys, labels, fine))]
        if self.coarse is not None:
            coarse = max(1, int(self.coarse * count))
            of_tokens = labels_of(levels[0].centroids, coarse, self.iterations).gather(2, labels)
            levels.insert(0, Level(of_tokens, centroids(keys, of_tokens, coarse)))
        return levels


def _together(streams: Sequence[SqueezedStream]) -> Iterator[Sequence[SqueezedStream]]:
    """Groups of layers whose keys are clustered at once, because each call costs the host as much for one layer."""
    size = max((stream.buffer.filled[0].numel() for stream in streams), default=1)
    at_once = max(1, _NUMBERS // max(size, 1))
    for start in range(0, len(streams), at_once):
        yield streams[start : start + at_once]


def quantile(scores: Tensor, share: float) -> Tensor:
    """(B,) quantiles of (B, M) by linear interpolation; torch.quantile is limited to 16 million elements."""
    place = share * (scores.shape[1] - 1)
    below = int(place)
    ordered = scores.sort(dim=1).values
    return torch.lerp(ordered[:, below], ordered[:, min(below + 1, scores.shape[1] - 1)], place - below)


class SqueezedStream(KeyValueStream):
    """The whole past of a layer, with an index of the prompt's clusters.

    Attributes:
        levels: the clusterings, coarse first; empty if the prompt has at most ``observed`` tokens; None before the
            prompt ends.
        thresholds: (B,), for each level.
        reads: the pairs that each head read (B, H), for each call with a single token after the prompt. A centroid
            counts as half a pair.
    """

    rows_cost_alike: ClassVar[bool] = False

    def __init__(self, system: SqueezedAttention, impl: Impl) -> None:
        super().__init__(None, impl)
        self.system = system
        self.levels: list[Level] | None = None
        self.thresholds: list[Tensor] = []
        self.reads: list[Tensor] = []
        self._waiting: Tensor | None = None
        self._scale = 1.0
        self._together: RowsTogether | None = None
        # Of each call with several tokens after the prompt, how many clustered keys each row (B,) has not read. They
        # stay on the device, so that the host need not wait for them in each call.
        self._unread: list[Tensor] = []
        # For each row, the sums of both that the host has fetched; and the number of calls that they are of.
        self._fetched: list[tuple[float, float]] = []
        self._of = (0, 0)
        # The pairs that the tokens of the reads would have read in dense attention.
        self._dense = 0

    @property
    def nbytes(self) -> int:
        """Bytes stored, including the index and the stored queries."""
        parts = [part for level in self.levels or () for part in level]
        parts += [] if self._waiting is None else [self._waiting]
        return super().nbytes + sum(part.numel() * part.element_size() for part in parts)

    @property
    def attended_pairs(self) -> float:
        """The dense pairs without the clustered keys that tokens after the prompt have not read; mean over the rows."""
        fetch_numbers([self])
        return self._pairs(*self._mean)

    @property
    def read_share(self) -> float | None:
        """Mean over the rows, the heads and the single tokens after the prompt."""
        fetch_numbers([self])
        return self._mean[1] / self._dense if self.reads else None

    def cost_of(self, row: int) -> tuple[float, float | None]:
        """See :class:`Stream`."""
        fetch_numbers([self])
        unread, read = self._fetched[row] if self._fetched else (0.0, 0.0)
        return self._pairs(unread, read), read / self._dense if self.reads else None

    @property
    def _mean(self) -> tuple[float, float]:
        """The fetched sums, mean over the rows."""
        unread, read = (sum(sums) for sums in zip(*self._fetched, strict=True)) if self._fetched else (0.0, 0.0)
        return unread / max(len(self._fetched), 1), read / max(len(self._fetched), 1)

    def _pairs(self, unread: float, read: float) -> float:
        of_tokens = self._dense + len(self.reads) * looked_up_of(self.levels or ()) - read
        return super().attended_pairs - unread - of_tokens

    @property
    def on_device(self) -> Tensor | None:
        """See :class:`Stream`."""
        if self._of == (len(self._unread), len(self.reads)):
            return None
        none = self.thresholds[0].new_zeros(len(self.thresholds[0]), 1)
        unread = torch.stack(self._unread or [none[:, 0]]).double().sum(dim=0)
        reads = torch.stack(self.reads or [none]).double().mean(dim=2).sum(dim=0)
        return torch.stack([unread, reads], dim=1).flatten()

    def fetched(self, numbers: Sequence[float]) -> None:
        """See :class:`Stream`."""
        self._fetched = list(zip(numbers[::2], numbers[1::2], strict=True))
        self._of = (len(self._unread), len(self.reads))

    @classmethod
    def attend_rows(
        cls, streams: Sequence[Stream], query: Tensor, key: Tensor, value: Tensor, scale: float
    ) -> Tensor | None:
        """See :class:`Stream`. Rows with an index attend together."""
        rows = [stream for stream in streams if isinstance(stream, cls)]
        if torch.is_grad_enabled() or not all(row.levels for row in rows):
            return None
        memory, buffers = rows[0]._together, [row.buffer for row in rows]
        if memory is None or not memory.holds(buffers):
            memory = RowsTogether([row.levels or () for row in rows], [row.thresholds for row in rows], buffers)
        output, reads = memory.attend(query, key, value, scale)
        for row, read in zip(rows, reads.split(1), strict=True):
            row._together = memory
            row.count(1)
            row._note(read)
        return output

    def _note(self, read: Tensor) -> None:
        """Note the pairs (B, H) that a token, which has been counted, has read."""
        self.reads.append(read)
        self._dense += self.seen

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """See :class:`Stream`."""
        grouped = query.unflatten(1, (key.shape[1], -1))
        if self.levels is None:
            self._scale = scale
            parts = [grouped] if self._waiting is None else [self._waiting, grouped]
            self._waiting = torch.cat(parts, dim=3)[:, :, :, -self.system.observed :].clone()
        if not self.levels:
            return super().attend(query, key, value, scale)
        return self._attend_squeezed(grouped, *self.extend(key, value), scale).flatten(1, 2)

    @property
    def clustered(self) -> Tensor:
        """The keys (B, H, n, D) of the prompt without its last ``observed`` tokens."""
        key, _ = self.buffer.filled
        return key[:, :, : max(key.shape[2] - self.system.observed, 0)]

    def index(self, levels: list[Level]) -> None:
        """Store the clusterings; empty if there is nothing to cluster."""
        self.levels = levels
        if not levels:
            self._waiting = None

    def observed_scores(self, level: int) -> Tensor:
        """(B, H, n): the estimated attention of the stored queries to each key, at one level alone."""
        assert self.levels is not None
        assert self._waiting is not None
        scores = self.levels[level].member_probabilities(self._waiting, self._scale)
        if level == len(self.levels) - 1:
            self._waiting = None
        return scores

    def lookup(self, query: Tensor, scale: float) -> Tensor:
        """(B, H, n) bool: the clustered keys that the queries (B, H, G, N, D) of one call read."""
        assert self.levels is not None
        alive: Tensor | None = None
        for level, threshold in zip(self.levels, self.thresholds, strict=True):
            passed = level.member_probabilities(query, scale, alive) > threshold[:, None, None]
            alive = passed if alive is None else alive & passed
        assert alive is not None
        return alive

    def rows(self, indices: Tensor) -> SqueezedStream:
        """See :class:`Stream`."""
        other = SqueezedStream(self.system, self.impl)
        other.seen, other._scale, other._dense = self.seen, self._scale, self._dense
        other._store = None if self._store is None else self._store.rows(indices)
        other._waiting = None if self._waiting is None else self._waiting[indices]
        if self.levels is not None:
            other.levels = [Level(*(part[indices] for part in level)) for level in self.levels]
        other.thresholds = [threshold[indices] for threshold in self.thresholds]
        other.reads = [read[indices] for read in self.reads]
        other._unread = [unread[indices] for unread in self._unread]
        return other

    def _attend_squeezed(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Exact attention (B, H, G, N, D) over the clustered keys that are read, the unclustered ones and new ones."""
        chosen, count = self.lookup(query, scale), query.shape[3]
        split = chosen.shape[2]
        always = chosen.new_ones(*chosen.shape[:2], key.shape[2] - split)
        if count == 1:
            # A list of what is read, not a mask, so that time falls with the share. Its length makes the host wait.
            most = int(chosen.sum(dim=-1).max())
            listed = chosen.sort(dim=-1, descending=True, stable=True).indices[..., :most]
            key, value = (
                torch.cat([gather_kept(rows[:, :, :split], listed), rows[:, :, split:]], dim=2) for rows in (key, value)
            )
            read = torch.cat([chosen.gather(2, listed), always], dim=2)
            self._note(read.sum(dim=-1) + looked_up_of(self.levels or ()))
        else:
            read = torch.cat([chosen, always], dim=2)
            self._unread.append(count * (~chosen).sum(dim=-1).double().mean(dim=1))
        causal = torch.ones(count, read.shape[2], dtype=torch.bool, device=key.device).tril(read.shape[2] - count)
        visible = (read[:, :, None] & causal).repeat(1, 1, query.shape[2], 1)
        rows = query.flatten(2, 3)
        return sdpa(rows, key, value, mask=visible, scale=scale).reshape(query.shape)
