"""The memory of a decoder, in which the attention of single tokens runs with lengths that are on the device.

Dimensions: B rows, H key-value heads, Hq query heads, D head_dim.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lrsa_lit.ops.sparse_attention import (
    HeadGroups,
    KeyValueStream,
    bare_keys,
    implementation,
    most_window_rows,
    through_channels,
)


class Places:
    """The indices at which parts with the same rule store new tokens, on the device.

    The decoder writes them to ``ends``, int64: (B,) for each row, or (1,) for all.
    """

    def __init__(self, ends: Tensor) -> None:
        self.ends = ends
        self.rows = torch.arange(len(ends), device=ends.device)

    def put(self, memory: Tensor, new: Tensor) -> None:
        """Write the new tokens (B, H, 1, D) to their indices in the memory (B, H, capacity, D)."""
        if len(self.ends) == 1:
            memory.index_copy_(2, self.ends, new)
        else:
            memory[self.rows, :, self.ends] = new[:, :, 0]


class FilledLengths(Places):
    """The indices of new keys and values, and the filled lengths of their memory."""

    def __init__(self, ends: Tensor) -> None:
        super().__init__(ends)
        self.length = torch.zeros_like(ends, dtype=torch.int32)

    def include_new(self) -> None:
        """Include the new tokens in the filled lengths, because they attend to themselves."""
        self.length.copy_(self.ends + 1)


class LayerMemory:
    """The memory of one layer or of a group of its heads. The attention uses it like a layer of the cache.

    The rows are moved to it; it has room for ``places`` tokens per row. If the compressor needs queries, there is also
    memory for them. Its last row receives the queries that are not needed, so that one graph serves all tokens.
    """

    def __init__(
        self, streams: Sequence[KeyValueStream], places: int, filled: FilledLengths, query_places: Places
    ) -> None:
        self.filled, self.query_places, self.impl = filled, query_places, streams[0].impl
        self.compressor = streams[0].rule.compressor
        rows = _rows(streams)
        self.memories = [
            [part.new_empty(rows, part.shape[1], count, part.shape[3]) for part in buffer.whole]
            for buffer, count in zip(streams[0].buffers, (places, most_window_rows(streams[0].rule) + 1), strict=False)
        ]
        self.key, self.value = self.memories[0]
        self.take(streams)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Attention (B, Hq, 1, D) of one new token per row, which is stored after the other tokens of its row."""
        if self.compressor.has_bias:
            return through_channels(self._attend, query, key, value, scale)
        return self._attend(query, key, value, scale)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        self.filled.put(self.key, key)
        self.filled.put(self.value, value)
        for (memory,) in self.memories[1:]:
            self.query_places.put(memory, query)
        run = implementation(self.impl, query)
        keys = bare_keys(self.key, self.value, self.compressor)
        output: Tensor = run.attend_one(query, keys, self.value, self.filled.length, scale)
        return output

    def can_hold(self, streams: Sequence[KeyValueStream], places: int) -> bool:
        """Whether these rows fit: the same number, dtype and implementation as at first, and enough room."""
        key = streams[0].buffer.whole[0]
        writable = torch.is_inference_mode_enabled() or not self.key.is_inference()
        same = (_rows(streams), key.dtype, len(streams)) == (len(self.key), self.key.dtype, len(self.filled.ends))
        return writable and same and streams[0].impl == self.impl and self.key.shape[2] >= places

    def take(self, streams: Sequence[KeyValueStream]) -> None:
        """Move other rows here."""
        for row, stream in enumerate(streams):
            part = slice(None) if len(streams) == 1 else slice(row, row + 1)
            for buffer, memory in zip(stream.buffers, self.memories, strict=True):
                place = tuple(tensor[part] for tensor in memory)
                if buffer.address != place[0].data_ptr():
                    buffer.move_to(place)


class GroupedMemory:
    """The memory of a layer whose heads differ: it takes the memory of each group of heads from ``memories``."""

    def __init__(self, groups: HeadGroups, memories: Iterator[LayerMemory]) -> None:
        self.groups = groups
        self.parts = list(itertools.islice(memories, len(groups.heads)))

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """See :class:`LayerMemory`."""
        split = (self.groups.split(tensor) for tensor in (query, key, value))
        return self.groups.join([part.attend(*new, scale) for part, *new in zip(self.parts, *split, strict=True)])


def _rows(streams: Sequence[KeyValueStream]) -> int:
    """The number of batch rows, from one stream for all rows or one per row."""
    return len(streams) if len(streams) > 1 else len(streams[0].buffer.whole[0])
