"""The first call of rows with unequal lengths: one selection and one attention for all of them, as packed sequences.

Dimensions: T tokens of all rows, one row after another; H key-value heads, Hq query heads, D head_dim.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TypeGuard

from torch import Tensor

from lrsa_lit.ops.sparse_attention.api import implementation
from lrsa_lit.ops.sparse_attention.geometry import compact_size, partition_counts
from lrsa_lit.ops.sparse_attention.grouped_stream import GroupedStream
from lrsa_lit.ops.sparse_attention.slot_bias import through_channels
from lrsa_lit.ops.sparse_attention.stream import KeyValueStream, Stream


def can_start_together(streams: Sequence[Stream]) -> bool:
    """Whether :func:`start_together` can run: the rows are empty, and hold what a rule keeps or everything.

    False for systems and latents, whose streams do more with their tokens, and for compressors that take scores.
    """
    if _are_grouped(streams):
        return all(can_start_together(parts) for parts in zip(*(stream.parts for stream in streams), strict=True))
    return all(
        type(stream) is KeyValueStream and not stream.seen and not stream.rule.compressor.takes_scores
        for stream in streams
    )


def start_together(
    streams: Sequence[Stream], query: Tensor, key: Tensor, value: Tensor, boundaries: Sequence[int], scale: float
) -> Tensor:
    """Store the first tokens of several rows and return the attention of their queries, as each row gets it alone.

    Args:
        streams: one empty stream per row; all have the same rule.
        query: (1, Hq, T, D), packed.
        key: (1, H, T, D).
        value: (1, H, T, D).
        boundaries: 0 … T; row n has the tokens [boundaries[n], boundaries[n+1]), at least one.
        scale: factor of the attention logits.

    Returns:
        (1, Hq, T, D).
    """
    if _are_grouped(streams):
        return _start_groups(streams, query, key, value, boundaries, scale)
    rows = [stream for stream in streams if isinstance(stream, KeyValueStream)]
    rule, run = rows[0].rule, implementation(rows[0].impl, query)

    def attend(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        output: Tensor
        output, compact = run.forward_and_compact(query, key, value, rule, boundaries=boundaries, scale=scale)
        sizes = [compact_size(count, rule) for count in partition_counts(boundaries, rule)]
        lengths = [stop - start for start, stop in itertools.pairwise(boundaries)]
        parts = zip(*(part.split(sizes, dim=2) for part in compact), *_split(lengths, query, key, value), strict=True)
        for row, (kept_keys, kept_values, queries, keys, values) in zip(rows, parts, strict=True):
            row.start((kept_keys, kept_values), (keys, values), queries)
        return output

    if rule.compressor.has_bias:
        return through_channels(attend, query, key, value, scale)
    return attend(query, key, value, scale)


def _start_groups(
    streams: Sequence[GroupedStream], query: Tensor, key: Tensor, value: Tensor, boundaries: Sequence[int], scale: float
) -> Tensor:
    groups = streams[0].groups
    groups.check(key.shape[1])
    split = zip(groups.split(query), groups.split(key), groups.split(value), strict=True)
    parts = zip(*(stream.parts for stream in streams), strict=True)
    outputs = [start_together(rows, *given, boundaries, scale) for rows, given in zip(parts, split, strict=True)]
    for stream, (start, stop) in zip(streams, itertools.pairwise(boundaries), strict=True):
        stream.seen += stop - start
    return groups.join(outputs)


def _are_grouped(streams: Sequence[Stream]) -> TypeGuard[Sequence[GroupedStream]]:
    return all(isinstance(stream, GroupedStream) for stream in streams)


def _split(lengths: Sequence[int], *tensors: Tensor) -> list[tuple[Tensor, ...]]:
    return [tensor.split(list(lengths), dim=2) for tensor in tensors]
