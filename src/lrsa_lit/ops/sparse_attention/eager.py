"""The reference implementation in PyTorch: readable, for any device, exact in float64, differentiable.

All queries between two compressions share a prefix of the compact buffer and a contiguous raw range, so the work is
one small dense attention per span: memory O(T x visible keys). Dimensions are those of README.md.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from lrsa_lit.ops.sdpa import sdpa
from lrsa_lit.ops.sparse_attention.buffer import Pair, Seen, joined
from lrsa_lit.ops.sparse_attention.geometry import Span, compact_size, raw_start, spans
from lrsa_lit.ops.sparse_attention.rule import Rule
from lrsa_lit.ops.sparse_attention.selection import Selection, compact_buffer, compress, of_sequence, select

__all__ = ["attend", "attend_one", "attend_rows", "compress", "forward", "forward_and_compact", "select"]


def forward(
    query: Tensor, key: Tensor, value: Tensor, rule: Rule, *,
    boundaries: Sequence[int], scale: float, selection: Selection | None
) -> Tensor:  # fmt: skip
    """Run the operator on one packed sequence after another; the arguments of ``api.sparse_attention``, checked."""
    return forward_and_compact(query, key, value, rule, boundaries=boundaries, scale=scale, selection=selection)[0]


def forward_and_compact(
    query: Tensor, key: Tensor, value: Tensor, rule: Rule, *,
    boundaries: Sequence[int], scale: float, selection: Selection | None = None
) -> tuple[Tensor, Pair]:  # fmt: skip
    """:func:`forward`, and the compact buffer (B, H, M, D), S + K P rows of one sequence after another.

    Only the output is differentiable in every implementation.
    """
    offset = key.shape[2] - query.shape[2]
    outputs, buffers = [], []
    for index, (start, stop) in enumerate(itertools.pairwise(boundaries)):
        raw = key[:, :, start:stop], value[:, :, start:stop]
        chosen = None if selection is None else of_sequence(selection, rule, boundaries, index)
        queries = query[:, :, start : stop - offset]
        compact = compact_buffer(*raw, rule, chosen, queries)
        outputs.append(attend(queries, compact, raw, rule, scale=scale, query_offset=offset))
        buffers.append(compact)
    if len(outputs) == 1:
        return outputs[0], buffers[0]
    return torch.cat(outputs, dim=2), joined(*buffers)


def attend(
    query: Tensor, compact: Pair, raw: Pair, rule: Rule, *, scale: float, query_offset: int = 0, raw_offset: int = 0
) -> Tensor:
    """Attention of one sequence's queries over its compact buffer and its raw tokens.

    Args:
        query: (B, Hq, Tq, D), of the tokens from position ``query_offset`` on.
        compact: keys and values (B, H, >= S + K P, D): sinks, then the kept pairs of each partition.
        raw: keys and values (B, H, Tr, D) of the tokens from position ``raw_offset`` on.
        rule: the rule.
        scale: factor of the scores before the softmax.
        query_offset: position of the first query.
        raw_offset: position of the first raw token, at most the raw start of the first query.

    Returns:
        (B, Hq, Tq, D) in the query's dtype.
    """
    grouped = query.unflatten(1, (raw[0].shape[1], -1))  # (B, H, G, Tq, D)
    parts = []
    for span in spans(query_offset, query_offset + query.shape[2], rule):
        keys, values = (_visible(*pair, span, rule, raw_offset) for pair in zip(compact, raw, strict=True))
        piece = grouped[..., span.start - query_offset : span.stop - query_offset, :]
        parts.append(causal_attention(piece, keys, values, scale))
    return torch.cat(parts, dim=-2).flatten(1, 2)


def attend_rows(query: Tensor, rows: Sequence[Seen], rule: Rule, *, scale: float) -> Tensor:
    """:func:`attend` for the new tokens of several rows: queries and output (1, Hq, N, D), one row after another."""
    queries = query.split([row.tokens - row.new_from for row in rows], dim=2)
    outputs = [
        attend(part, row.compact, row.raw, rule, scale=scale, query_offset=row.new_from, raw_offset=row.raw_from)
        for part, row in zip(queries, rows, strict=True)
    ]
    return torch.cat(outputs, dim=2)


def attend_one(query: Tensor, key: Tensor, value: Tensor, length: Tensor, scale: float) -> Tensor:
    """Attention of one query per row over the filled part of a buffer. Not differentiable on a GPU.

    Args:
        query: (B, Hq, 1, D).
        key: (B, H, capacity, D). Only the first ``length`` keys of a row are read; the others may hold anything.
        value: (B, H, capacity, D), likewise.
        length: int32, 1 … capacity: the filled keys of each row (B,) or of all rows (1,). It is read on the device, so
            a CUDA graph can be replayed with other values.
        scale: factor of the scores before the softmax.

    Returns:
        (B, Hq, 1, D) in the query's dtype.
    """
    filled = torch.arange(key.shape[2], device=key.device) < length[:, None]  # (B or 1, capacity)
    # Zero the unfilled rows: neither a mask nor a weight of zero removes a NaN.
    key, value = (rows.masked_fill(~filled[:, None, :, None], 0.0) for rows in (key, value))
    grouped = query.unflatten(1, (key.shape[1], -1)).flatten(2, 3)
    visible = filled[:, None, None]
    return sdpa(grouped, key, value, mask=visible, scale=scale).reshape(query.shape)


def _visible(compact: Tensor, raw: Tensor, span: Span, rule: Rule, raw_offset: int) -> Tensor:
    """Keys (or values) that the queries of the span see, in order: (B, H, S + K P + raw, D)."""
    recent = raw[:, :, raw_start(span.partitions, rule) - raw_offset : span.stop - raw_offset]
    if span.partitions == 0:
        return recent
    return torch.cat([compact[:, :, : compact_size(span.partitions, rule)], recent], dim=2)


def causal_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Dense causal attention of the last N of M positions (a bottom-right aligned mask).

    Queries and output are (B, H, G, N, D), with the G query heads of each key-value head; keys and values (B, H, M, D).
    """
    group, count = query.shape[2:4]
    visible = None
    if count > 1:
        mask = torch.ones(count, key.shape[2], dtype=torch.bool, device=query.device).tril(key.shape[2] - count)
        visible = mask.repeat(group, 1)
    # The query heads of a group share their keys: fold them into the rows of one product instead of repeating keys.
    rows = query.flatten(2, 3)
    return sdpa(rows, key, value, mask=visible, scale=scale).reshape(*query.shape[:-1], value.shape[-1])
