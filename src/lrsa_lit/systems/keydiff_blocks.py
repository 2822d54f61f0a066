"""KeyDiff's own form: a cache of a fixed size through which a prompt goes block by block.

Dimensions: B batch, H key-value heads, N pairs of the cache, b tokens of a block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lrsa_lit.bounds import check_integers
from lrsa_lit.ops.sparse_attention import Impl, KeyValueStream, Stream
from lrsa_lit.ops.sparse_attention.buffer import PairBuffer
from lrsa_lit.ops.sparse_attention.compressors import gather_kept
from lrsa_lit.systems.key_scores import unlikeness
from lrsa_lit.systems.one_shot import highest
from lrsa_lit.systems.system import Place, System


@dataclass(frozen=True)
class KeyDiffBlocks(System):
    """Behind each block of a prompt, keep the N keys that are least like the others in the cache (arXiv 2504.15364).

    Keys stay at their original positions, and no sink is sure of its place. Those of the answer are all kept, which is
    ours. :class:`KeyDiff` is the form of one cut.

    Args:
        pairs: of the cache (N); the first N tokens of a prompt fill it before the first block.
        block: tokens of a block (b).
    """

    pairs: int = 2048
    block: int = 128
    graphable: ClassVar[bool] = True
    budget_field: ClassVar[str] = "pairs"

    def __post_init__(self) -> None:
        check_integers(self, 1, "pairs", "block")

    def stream(self, place: Place, impl: Impl) -> Stream:
        """See :class:`System`."""
        return BlockStream(self, impl)

    def held(self, tokens: int) -> float:
        """See :class:`System`."""
        return min(tokens, self.pairs)

    def attended_pairs(self, length: int) -> int:
        """Each token sees the N and those of its block."""
        first, later = min(length, self.pairs), max(length - self.pairs, 0)
        whole, rest = divmod(later, self.block)
        within = whole * self.block * (self.block + 1) // 2 + rest * (rest + 1) // 2
        return first * (first + 1) // 2 + later * self.pairs + within


class BlockStream(KeyValueStream):
    """At most N + b pairs of a prompt; where it ends, N, and all of the answer."""

    def __init__(self, system: KeyDiffBlocks, impl: Impl) -> None:
        super().__init__(None, impl)
        self.system, self._answers = system, False

    @property
    def attended_pairs(self) -> float:
        """As the system has it, of a prompt."""
        return self.system.attended_pairs(self.seen)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """See :class:`Stream`."""
        if self._answers:
            return super().attend(query, key, value, scale)
        outputs, start = [], 0
        while start < key.shape[2]:
            stop = min(start + self._room, key.shape[2])
            part = slice(start, stop)
            outputs.append(super().attend(query[:, :, part], key[:, :, part], value[:, :, part], scale))
            if self._room == self.system.block:
                self._evict()
            start = stop
        return torch.cat(outputs, dim=2)

    @property
    def _room(self) -> int:
        """Tokens until the cache is full, or else until the block is."""
        behind = self.seen - self.system.pairs
        return -behind if behind < 0 else self.system.block - behind % self.system.block

    @torch.no_grad()
    def _evict(self) -> None:
        """Let N pairs stay."""
        if self.buffer.length > self.system.pairs:
            self._peak = self.peak_nbytes
            key, value = self.buffer.filled
            kept = highest(unlikeness(key), self.system.pairs)
            pairs = gather_kept(key, kept), gather_kept(value, kept)
            self.buffer.length = 0
            self.buffer.append(pairs)

    @torch.no_grad()
    def end_prompt(self) -> None:
        """The last block may be shorter."""
        if not self._answers and self._store is not None:
            self._evict()
            self._store = PairBuffer(*self.buffer.filled)
            self._answers = True

    def most_stored(self, tokens: int) -> int:
        """See :class:`KeyValueStream`."""
        return self.buffer.length + tokens

    def rows(self, indices: Tensor) -> BlockStream:
        """See :class:`Stream`."""
        other = BlockStream(self.system, self.impl)
        other.seen, other._answers = self.seen, self._answers
        other._store = None if self._store is None else self._store.rows(indices)
        other._peak = self._peak // len(self.buffer.whole[0]) * len(indices) if self._peak else 0
        return other
