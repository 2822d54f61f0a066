"""Rows of unequal lengths whose streams process a prompt part by part: they attend together for as long as they last.

Dimensions: B rows, N columns of a call, H key-value heads, Hq query heads, D head_dim.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lrsa_lit.ops.sparse_attention.abstract_stream import Stream
from lrsa_lit.ops.to_device import to_device


def attend_by_length(
    streams: Sequence[Stream], spans: Sequence[tuple[int, int]], query: Tensor, key: Tensor, value: Tensor, scale: float
) -> tuple[Tensor, list[Stream]]:
    """The first call of several rows, in as many calls of one stream as there are different lengths.

    Args:
        streams: an empty stream for each row; all are alike.
        spans: for each row, the columns [start, stop) of its tokens.
        query: (B, Hq, N, D).
        key: (B, H, N, D).
        value: (B, H, N, D).
        scale: factor of the attention logits.

    Returns:
        (B, Hq, N, D), which is 0 in all other columns, and the stream of each row.
    """
    lengths, output, found = [stop - start for start, stop in spans], torch.zeros_like(query), list(streams)
    order = sorted(range(len(spans)), key=lambda row: -lengths[row])
    starts = to_device([(row, spans[row][0]) for row in order], query.device)
    numbers, places = (torch.arange(count, device=query.device) for count in (len(order), lengths[order[0]]))
    rows, columns = starts[:, :1], (starts[:, 1:] + places).clamp(max=query.shape[2] - 1)
    queries, keys, values = (tensor[rows, :, columns].transpose(1, 2) for tensor in (query, key, value))
    stream, begin, left = streams[order[0]], 0, sum(length > 0 for length in lengths)
    for length in sorted(set(lengths) - {0}):
        now, new = slice(left), slice(begin, length)
        attended = stream.attend(queries[now, :, new], keys[now, :, new], values[now, :, new], scale)
        output[rows[now], :, columns[now, new]] = attended.transpose(1, 2)
        further = sum(other > length for other in lengths)
        for place in range(further, left):
            found[order[place]] = stream.rows(numbers[place : place + 1]) if left > 1 else stream
        stream = stream.rows(numbers[:further]) if 0 < further < left else stream
        begin, left = length, further
    return output, found
