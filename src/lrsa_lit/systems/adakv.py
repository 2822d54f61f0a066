"""One-shot selection with a budget shared by the heads of a layer: AdaKV (arXiv 2407.11550).

Dimensions: B batch, H key-value heads, T tokens of the prompt, n pairs of a head on average.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lrsa_lit.bounds import check_setting, is_weight
from lrsa_lit.ops.sparse_attention import GroupedStream, HeadGroups, Impl, KeyValueStream, Stream
from lrsa_lit.ops.sparse_attention.buffer import Pair, PairBuffer
from lrsa_lit.ops.sparse_attention.compressors import gather_kept
from lrsa_lit.systems.one_shot import OneShotStream, Prompt, ascending, highest
from lrsa_lit.systems.rescored import Rescored
from lrsa_lit.systems.system import Place


@dataclass(frozen=True)
class AdaKV(Rescored):
    """Keep the H n highest-scoring pairs over all heads of a layer, as kvpress's AdaKVPress.

    Each head is guaranteed a share of its n pairs. The rest go to the heads with the highest scores, so heads hold
    different numbers of pairs, and each row of a batch has its own stream. kvpress only masks the other pairs; here
    they are freed.

    Args:
        alpha: the share that each head is guaranteed, 0 to 1; with 1 every head keeps n pairs.
    """

    alpha: float = 0.2
    rows_differ: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_setting("alpha", self.alpha, is_weight(self.alpha) and self.alpha <= 1, "a number from 0 to 1")

    def scores(self, prompt: Prompt) -> Tensor:
        """The scorer's scores; the guaranteed pairs of each head get the largest number of the dtype."""
        scores, count = super().scores(prompt), self.count(prompt.tokens)
        sure = max(int(count * self.alpha), 1) if self.alpha else 0
        return scores.scatter(-1, highest(scores, sure), torch.finfo(scores.dtype).max)

    def keep(self, prompt: Prompt) -> Tensor:
        """The positions to keep; heads keep different numbers, and are padded with -1."""
        count, tokens = self.count(prompt.tokens), prompt.tokens
        if count == tokens:
            return super().keep(prompt)
        scores = self.scores(prompt)
        return highest_together(scores, scores.shape[1] * count)

    def stream(self, place: Place, impl: Impl) -> Stream:
        """See :class:`System`."""
        return UnequalStream(self, place, impl)


def highest_together(scores: Tensor, count: int) -> Tensor:
    """Positions of the highest scores (B, H, T) over all heads of a row; ties go to the earlier head and token.

    Returns:
        (B, H, at most ``count``) int64, ascending; heads that have fewer are padded with -1.
    """
    tokens, best = scores.shape[2], highest(scores.flatten(1), count)
    kept = torch.zeros_like(scores, dtype=torch.bool).flatten(1).scatter(1, best, True).view_as(scores)
    places = torch.arange(tokens, device=kept.device).where(kept, tokens)
    return ascending(places, tokens)[..., :count]


class UnequalStream(OneShotStream):
    """A one-row stream that, after the selection, has one stream per head.

    Heads that happen to keep equally many pairs have streams of their own, too, so that all rows have the same parts.
    """

    _grouped: GroupedStream | None = None

    @property
    def parts(self) -> Sequence[Stream]:
        """See :class:`Stream`."""
        return (self,) if self._grouped is None else self._grouped.parts

    @property
    def groups(self) -> HeadGroups | None:
        """See :class:`Stream`."""
        return None if self._grouped is None else self._grouped.groups

    @property
    def stored(self) -> Pair | None:
        """See :class:`Stream`."""
        return super().stored if self._grouped is None else None

    @property
    def nbytes(self) -> int:
        """The sum over the parts."""
        return super().nbytes if self._grouped is None else self._grouped.nbytes

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """See :class:`Stream`."""
        if self._grouped is None:
            return super().attend(query, key, value, scale)
        self.seen += key.shape[2]
        return self._grouped.attend(query, key, value, scale)

    def count(self, tokens: int) -> None:
        """See :class:`KeyValueStream`."""
        if self._grouped is None:
            super().count(tokens)
        else:
            self._grouped.count(tokens)
            self.seen += tokens

    def _store_only(self, kept: Tensor, counts: Sequence[Sequence[int]]) -> None:
        """As in :class:`OneShotStream`, but each head keeps a number of its own."""
        parts, (of_heads,) = [], counts
        for head, count in enumerate(of_heads):
            part, own = KeyValueStream(None, self.impl), slice(head, head + 1)
            pairs = (gather_kept(held[:, own], kept[:, own, :count]) for held in self.buffer.filled)
            part._store, part.seen = PairBuffer(*pairs), self.seen
            parts.append(part)
        groups = HeadGroups(tuple((head,) for head in range(len(of_heads))))
        self._grouped, self._store = GroupedStream(groups, parts), None

    def rows(self, indices: Tensor) -> UnequalStream:
        """See :class:`Stream`."""
        other = super().rows(indices)
        assert isinstance(other, UnequalStream)
        other._grouped = None if self._grouped is None else self._grouped.rows(indices)
        return other
