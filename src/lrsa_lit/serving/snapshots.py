"""Snapshots of caches at the ends of chunks, for later prompts that begin with the same tokens.

Dimensions: H key-value heads, D head_dim.
"""

from __future__ import annotations

import array
import collections
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from lrsa_lit.attention import LRSACache
from lrsa_lit.attention.cache_layer import Past
from lrsa_lit.ops.sparse_attention import Held, KeyValueStream, Rule

_MOST_SEEN = 100_000
"""The most chunk ends of earlier prompts to remember, 32 bytes each."""
Place = tuple[int, int, str]
"""A layer, a part of it, and the kind of tensors."""


class Plan(NamedTuple):
    """How much of a prompt a snapshot covers, and where to take snapshots of the rest.

    Attributes:
        length: the number of tokens of the longest snapshot with which the prompt begins; 0 if there is none.
        key: the key of this snapshot, the parent of the next one; None if there is none.
        wanted: lengths at which to call :meth:`Snapshots.take`, each with its key: the last chunk end that an earlier
            prompt shares, the last chunk end of this prompt, and some others at regular distances.
    """

    length: int
    key: bytes | None
    wanted: dict[int, bytes]


@dataclass(eq=False)
class _Snapshot:
    """The rows that are new since the parent: settled rows, which later tokens do not change, and the raw window.

    Both are tensors (1, H, rows, D) by layer, part and kind.
    """

    key: bytes
    length: int
    parent: _Snapshot | None
    settled: dict[Place, tuple[Tensor, ...]]
    recent: dict[Place, tuple[Tensor, ...]]
    token_bytes: list[int]
    settled_rows: dict[tuple[int, int], int]
    children: int = 0
    nbytes: int = field(init=False)

    def __post_init__(self) -> None:
        tensors = [tensor for held in (self.settled, self.recent) for each in held.values() for tensor in each]
        self.nbytes = sum(tensor.nbytes for tensor in tensors)


class Snapshots:
    """Snapshots of one-row caches by their tokens. The least recently used ones are removed first.

    Snapshots of the same text share their compact pairs; each has its own raw window. They are taken at the ends of
    chunks, so that a prompt that continues from one gets the same answer as without it.

    Args:
        rule: the rule of the cache.
        capacity: the most bytes in all; 0 keeps no snapshots.
        every: approximate number of tokens between two snapshots of a new text.

    Attributes:
        nbytes: bytes of all snapshots.
    """

    def __init__(self, rule: Rule, capacity: int, every: int = 2048) -> None:
        self.rule, self.capacity = rule, capacity
        self._stride = max(1, every // rule.chunk)
        self._kept: collections.OrderedDict[bytes, _Snapshot] = collections.OrderedDict()
        self._seen: collections.OrderedDict[bytes, None] = collections.OrderedDict()
        self.nbytes = 0

    def __len__(self) -> int:
        """The number of snapshots."""
        return len(self._kept)

    def plan(self, ids: Sequence[int]) -> Plan:
        """Look up a prompt by the digests of its tokens, and note it for later prompts."""
        if not self.capacity:
            return Plan(0, None, {})
        keys = dict(self._keys(ids))
        ends = list(keys)
        known = max((end for end in ends if keys[end] in self._kept), default=0)
        departs = max((end for end in ends if keys[end] in self._seen), default=0)
        for key in keys.values():
            self._seen[key] = None
            self._seen.move_to_end(key)
        while len(self._seen) > _MOST_SEEN:
            self._seen.popitem(last=False)
        wanted = {departs, *ends[-1:], *ends[:: self._stride]}
        return Plan(known, keys.get(known), {end: keys[end] for end in ends if end in wanted and end > known})

    def restore(self, key: bytes, cache: LRSACache) -> None:
        """Fill an empty cache from the snapshot that :meth:`plan` found; no other may be taken in between."""
        snapshot: _Snapshot | None = self._kept[key]
        assert snapshot is not None
        length = snapshot.length
        chain: list[_Snapshot] = []
        recent, token_bytes = snapshot.recent, snapshot.token_bytes
        while snapshot is not None:
            chain.append(snapshot)
            # Children first, so that a parent is always more recently used than its children.
            snapshot = snapshot.parent
        for each in chain:
            self._kept.move_to_end(each.key)
        parts: dict[Place, tuple[Tensor, ...]] = {}
        for place, window in recent.items():
            rows = [each.settled[place] for each in reversed(chain) if place in each.settled]
            parts[place] = tuple(torch.cat(tensors, dim=2) for tensors in zip(*rows, window, strict=True))
        cache.restore([_past(layer, length, bytes_, parts) for layer, bytes_ in enumerate(token_bytes)])

    def take(self, key: bytes, cache: LRSACache, parent: bytes | None) -> None:
        """Take a snapshot of a cache with one row.

        Args:
            key: the key, from :attr:`Plan.wanted`.
            cache: the cache, which must be at the end of a chunk.
            parent: the key of the previous snapshot of the same prompt, if there is one.
        """
        if key in self._kept:
            self._kept.move_to_end(key)
            return
        before = None if parent is None else self._kept.get(parent)
        snapshot = _of(cache, key, before)
        if snapshot.nbytes > self.capacity:
            return
        self._kept[key] = snapshot
        self.nbytes += snapshot.nbytes
        if before is not None:
            before.children += 1
            ancestor: _Snapshot | None = before
            while ancestor is not None:
                self._kept.move_to_end(ancestor.key)
                ancestor = ancestor.parent
        self._evict()

    def _evict(self) -> None:
        while self.nbytes > self.capacity:
            oldest = next(each for each in self._kept.values() if not each.children)
            del self._kept[oldest.key]
            self.nbytes -= oldest.nbytes
            if oldest.parent is not None:
                oldest.parent.children -= 1

    def _keys(self, ids: Sequence[int]) -> Iterator[tuple[int, bytes]]:
        """Each chunk end before the last token of the prompt, with the digest of the tokens before it."""
        digest, before = hashlib.sha256(), 0
        first = self.rule.sink_size + 2 * self.rule.lag_size
        for end in range(first, len(ids), self.rule.chunk):
            digest.update(array.array("I", ids[before:end]).tobytes())
            before = end
            yield end, digest.digest()


def _of(cache: LRSACache, key: bytes, parent: _Snapshot | None) -> _Snapshot:
    pasts = cache.pasts()
    settled: dict[Place, tuple[Tensor, ...]] = {}
    recent: dict[Place, tuple[Tensor, ...]] = {}
    settled_rows: dict[tuple[int, int], int] = {}
    for layer, (past, of_layer) in enumerate(zip(pasts, cache.layers, strict=True)):
        (stream,), (parts,) = of_layer.streams, past.held
        for part, (of_part, held) in enumerate(zip(stream.parts, parts, strict=True)):
            assert isinstance(of_part, KeyValueStream)
            start = 0 if parent is None else parent.settled_rows[layer, part]
            stop = settled_rows[layer, part] = of_part.settled
            for kind, tensors in held.items():
                if kind == "queries":
                    start = stop = 0
                settled[layer, part, kind] = tuple(tensor[:, :, start:stop].clone() for tensor in tensors)
                recent[layer, part, kind] = tuple(tensor[:, :, stop:].clone() for tensor in tensors)
    token_bytes = [past.token_bytes for past in pasts]
    return _Snapshot(key, pasts[0].columns, parent, settled, recent, token_bytes, settled_rows)


def _past(layer: int, length: int, token_bytes: int, parts: Mapping[Place, tuple[Tensor, ...]]) -> Past:
    held: list[Held] = []
    numbers = sorted({part for of_layer, part, _ in parts if of_layer == layer})
    for number in numbers:
        held.append({kind: tensors for (of, part, kind), tensors in parts.items() if (of, part) == (layer, number)})
    return Past(1, length, token_bytes, [length], [held])
