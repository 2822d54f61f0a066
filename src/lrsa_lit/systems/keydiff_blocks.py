"""KeyDiff as published: the prompt passes block by block through a cache of fixed size.

Dimensions: B batch, H key-value heads, N pairs in the cache, b tokens in a block.
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
    """After each block of a prompt, keep the N keys that are least similar to the others in the cache.

    KeyDiff (arXiv 2504.15364). Keys keep their original positions, and sinks may be dropped. Unlike in the paper, all
    pairs of the answer are kept. The system :class:`KeyDiff` selects once from the whole prompt.

    Args:
        pairs: pairs in the cache (N). The first N tokens of the prompt fill it before the first block.
        block: tokens in a block (b).
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
        """Each token sees the N cached pairs and the earlier tokens of its block."""
        first, later = min(length, self.pairs), max(length - self.pairs, 0)
        whole, rest = divmod(later, self.block)
        within = whole * self.block * (self.block + 1) // 2 + rest * (rest + 1) // 2
        return first * (first + 1) // 2 + later * self.pairs + within


class BlockStream(KeyValueStream):
    """Holds at most N + b pairs of a prompt, N at its end, and all pairs of the answer."""

    part_by_part: ClassVar[bool] = True

    def __init__(self, system: KeyDiffBlocks, impl: Impl) -> None:
        super().__init__(None, impl)
        self.system, self._answers = system, False

    @property
    def attended_pairs(self) -> float:
        """The pairs of a prompt of this length."""
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
        """Tokens until the cache is full, or, once it is, until the block is."""
        behind = self.seen - self.system.pairs
        return -behind if behind < 0 else self.system.block - behind % self.system.block

    @torch.no_grad()
    def _evict(self) -> None:
        """Keep N pairs."""
        if self.buffer.length > self.system.pairs:
            self._peak = self.peak_nbytes
            key, value = self.buffer.filled
            kept = highest(unlikeness(key), self.system.pairs)
            pairs = gather_kept(key, kept), gather_kept(value, kept)
            self.buffer.length = 0
            self.buffer.append(pairs)

    @torch.no_grad()
    def end_prompt(self) -> None:
        """End the last block, which may be shorter."""
        if not self._answers and self._store is not None:
            self._evict()
            self._store = PairBuffer(*self.buffer.filled)
            self._answers = True

    def rows(self, indices: Tensor) -> BlockStream:
        """See :class:`Stream`."""
        other = BlockStream(self.system, self.impl)
        other.seen, other._answers = self.seen, self._answers
        other._store = None if self._store is None else self._store.rows(indices)
        other._peak = self._peak // len(self.buffer.whole[0]) * len(indices) if self._peak else 0
        return other
