"""Rows of unequal lengths: one attention for all of them, as packed sequences, and in a first call one selection.

Dimensions: N new tokens of all rows, one row after another; H key-value heads, Hq query heads, D head_dim.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TypeGuard

import torch
from torch import Tensor

from lrsa_lit.ops.sparse_attention.abstract_stream import Stream
from lrsa_lit.ops.sparse_attention.api import implementation
from lrsa_lit.ops.sparse_attention.geometry import compact_size, partition_counts
from lrsa_lit.ops.sparse_attention.grouped_stream import GroupedStream
from lrsa_lit.ops.sparse_attention.slot_bias import through_channels
from lrsa_lit.ops.sparse_attention.stream import KeyValueStream


def can_attend_together(streams: Sequence[Stream]) -> bool:
    """Whether :func:`attend_together` can run: the streams hold what a rule keeps, or everything.

    False for systems and latents, whose streams do more with their tokens.
    """
    kinds = {type(stream) for stream in streams}
    parts = {type(part) for stream in streams for part in stream.parts}
    return kinds in ({KeyValueStream}, {GroupedStream}) and parts == {KeyValueStream}


def attend_together(
    streams: Sequence[Stream], query: Tensor, key: Tensor, value: Tensor, boundaries: Sequence[int], scale: float
) -> Tensor:
    """Store new tokens of several rows and return the attention of their queries, as each row gets it alone.

    Args:
        streams: one stream per row; all have the same rule.
        query: (1, Hq, N, D), packed.
        key: (1, H, N, D).
        value: (1, H, N, D).
        boundaries: 0 … N; row n has the new tokens [boundaries[n], boundaries[n+1]), at least one.
        scale: factor of the attention logits.

    Returns:
        (1, Hq, N, D).
    """
    if _are_grouped(streams):
        return _attend_by_groups(streams, query, key, value, boundaries, scale)
    rows = [stream for stream in streams if isinstance(stream, KeyValueStream)]
    compressor = rows[0].rule.compressor
    # Scores travel with the keys, and a compact buffer has none. The kernels' compact buffer has no gradient either.
    starting = not (compressor.takes_scores or torch.is_grad_enabled() or any(row.seen for row in rows))

    def attend(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        return (_start if starting else _continue)(rows, query, key, value, boundaries, scale)

    if compressor.has_bias:
        return through_channels(attend, query, key, value, scale)
    return attend(query, key, value, scale)


def _start(
    rows: Sequence[KeyValueStream], query: Tensor, key: Tensor, value: Tensor, boundaries: Sequence[int], scale: float
) -> Tensor:
    """The first call: all partitions are compressed together, too."""
    rule, run = rows[0].rule, implementation(rows[0].impl, query)
    output: Tensor
    output, compact = run.forward_and_compact(query, key, value, rule, boundaries=boundaries, scale=scale)
    sizes = [compact_size(count, rule) for count in partition_counts(boundaries, rule)]
    kept = (part.split(sizes, dim=2) for part in compact)
    for row, kept_keys, kept_values, tokens in zip(rows, *kept, _split(boundaries, query, key, value), strict=True):
        row.start((kept_keys, kept_values), tokens[1:], tokens[0])
    return output


def _continue(
    rows: Sequence[KeyValueStream], query: Tensor, key: Tensor, value: Tensor, boundaries: Sequence[int], scale: float
) -> Tensor:
    tokens = _split(boundaries, query, key, value)
    seen = [row.take(*new) for row, new in zip(rows, tokens, strict=True)]
    output: Tensor = implementation(rows[0].impl, query).attend_rows(query, seen, rows[0].rule, scale=scale)
    return output


def _attend_by_groups(
    streams: Sequence[GroupedStream], query: Tensor, key: Tensor, value: Tensor, boundaries: Sequence[int], scale: float
) -> Tensor:
    groups = streams[0].groups
    groups.check(key.shape[1])
    split = zip(groups.split(query), groups.split(key), groups.split(value), strict=True)
    parts = zip(*(stream.parts for stream in streams), strict=True)
    outputs = [attend_together(rows, *given, boundaries, scale) for rows, given in zip(parts, split, strict=True)]
    for stream, (start, stop) in zip(streams, itertools.pairwise(boundaries), strict=True):
        stream.seen += stop - start
    return groups.join(outputs)


def _are_grouped(streams: Sequence[Stream]) -> TypeGuard[Sequence[GroupedStream]]:
    return all(isinstance(stream, GroupedStream) for stream in streams)


def _split(boundaries: Sequence[int], query: Tensor, key: Tensor, value: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
    """The parts of query, key and value (1, heads, N, D) that belong to each row."""
    return [
        (query[:, :, start:stop], key[:, :, start:stop], value[:, :, start:stop])
        for start, stop in itertools.pairwise(boundaries)
    ]
