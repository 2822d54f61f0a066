"""The rows of a layer under Squeezed Attention, whose single tokens look up and attend together.

Dimensions: R rows, H key-value heads, Hq query heads, G of each key-value head, n the most clustered keys of a row, D
head_dim.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from lrsa_lit.ops.sdpa import sdpa
from lrsa_lit.ops.sparse_attention.buffer import PairBuffer
from lrsa_lit.ops.sparse_attention.compressors import gather_kept
from lrsa_lit.ops.to_device import to_device
from lrsa_lit.systems.clusters import Level

_ROOM = 128
"""Tokens of an answer to allocate memory for."""


class RowsTogether:
    """One memory for several rows, padded to the longest, in which their streams continue.

    Args:
        indices: the levels of each row's index.
        thresholds: for each row, the threshold (1,) of each level.
        buffers: the keys and values of each row, which move to this memory.
    """

    def __init__(
        self, indices: Sequence[Sequence[Level]], thresholds: Sequence[Sequence[Tensor]], buffers: Sequence[PairBuffer]
    ) -> None:
        self.levels = [Level(*map(_padded, zip(*level, strict=True))) for level in zip(*indices, strict=True)]
        self.thresholds = [torch.cat(level)[:, None, None] for level in zip(*thresholds, strict=True)]
        self._lengths, looked_up = [buffer.length for buffer in buffers], list(map(looked_up_of, indices))
        first, device = buffers[0].whole[0], buffers[0].whole[0].device
        clustered, self._ends = to_device([[levels[0].labels.shape[2] for levels in indices], self._lengths], device)
        self._looked_up = to_device(looked_up, device)[:, None]
        self._clustered = clustered[:, None, None]
        self._rows = torch.arange(len(buffers), device=device)
        # A key that no query sees must be finite.
        shape = len(buffers), first.shape[1], max(self._lengths) + _ROOM, first.shape[3]
        self.key, self.value = first.new_zeros(shape), first.new_zeros(shape)
        self._places = torch.arange(shape[2], device=device)
        for row, buffer in enumerate(buffers):
            buffer.move_to((self.key[row : row + 1], self.value[row : row + 1]))
        self._parts = [buffer.whole for buffer in buffers]

    def holds(self, buffers: Sequence[PairBuffer]) -> bool:
        """Whether these are the rows, nothing else has moved or extended them, and another token fits."""
        now, writable = [buffer.whole for buffer in buffers], not self.key.is_inference()
        same = len(now) == len(self._parts) and all(map(operator.is_, now, self._parts))
        full = max(self._lengths) == self.key.shape[2]
        lengths = [buffer.length for buffer in buffers]
        return same and lengths == self._lengths and not full and (writable or torch.is_inference_mode_enabled())

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """Store one token per row, (R, H or Hq, 1, D); the caller counts it in the buffers.

        Returns:
            The attention (R, Hq, 1, D), and the pairs that each head read, (R, H).
        """
        for memory, new in ((self.key, key), (self.value, value)):
            memory[self._rows, :, self._ends] = new[:, :, 0]
        self._ends = self._ends + 1
        self._lengths = [length + 1 for length in self._lengths]
        grouped, longest = query.unflatten(1, (key.shape[1], -1)), max(self._lengths)
        places = self._places[:longest]
        chosen = self._lookup(grouped, scale)
        always = (places >= self._clustered) & (places < self._ends[:, None, None])
        visible = pad(chosen, (0, longest - chosen.shape[2])) | always
        read = visible.sum(dim=-1)
        # A list of what is read, not a mask, so that time falls with the share. Its length makes the host wait.
        most = int(read.max())
        listed = visible.sort(dim=-1, descending=True, stable=True).indices[..., :most]
        keys, values = (gather_kept(memory[:, :, :longest], listed) for memory in (self.key, self.value))
        mask = (self._places[:most] < read[..., None])[:, :, None].expand(-1, -1, grouped.shape[2], -1)
        output = sdpa(grouped.flatten(2, 3), keys, values, mask=mask, scale=scale).reshape(query.shape)
        return output, read + self._looked_up

    def _lookup(self, query: Tensor, scale: float) -> Tensor:
        """(R, H, n) bool: the clustered keys that the queries (R, H, G, 1, D) read."""
        labels = self.levels[0].labels
        alive: Tensor = (self._places[: labels.shape[2]] < self._clustered).expand(labels.shape)
        for level, threshold in zip(self.levels, self.thresholds, strict=True):
            alive = alive & (level.member_probabilities(query, scale, alive) > threshold)
        return alive


def looked_up_of(levels: Sequence[Level]) -> float:
    """What looking up the clusters counts in pairs: half a pair per centroid."""
    return sum(level.centroids.shape[2] for level in levels) / 2


def _padded(rows: Sequence[Tensor]) -> Tensor:
    """Rows (1, H, length, …), padded with zeros to the longest: (R, H, longest, …)."""
    return pad_sequence([row[0].transpose(0, 1) for row in rows], batch_first=True).transpose(1, 2).contiguous()
