"""The readable definition in PyTorch: any device, float64-exact, differentiable.

Every query attends to a prefix of the compact buffer and to one contiguous raw range, and all queries between two
compressions share both, so the work is one small dense attention per span: memory O(T x visible keys).

Dimensions: B batch, H key-value heads, Hq query heads, T tokens, D head_dim, S sink_size, L lag_size, K top_k,
P partitions.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from lrsa_lit.ops.sparse_attention.geometry import Span, compact_size, raw_start, spans
from lrsa_lit.ops.sparse_attention.rule import Rule
from lrsa_lit.ops.sparse_attention.selection import (
    Selection,
    compact_buffer,
    compress_partitions,
    of_sequence,
    partitions_of,
)


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rule: Rule,
    *,
    boundaries: Sequence[int],
    scale: float,
    selection: Selection | None,
) -> Tensor:
    """The operator, one packed sequence after the other; arguments as in ``api.sparse_attention``, already checked.

    ``boundaries`` are 0 … T of the sequences; with fewer queries than keys there is one sequence.
    """
    offset = key.shape[2] - query.shape[2]
    outputs = []
    for index, (start, stop) in enumerate(itertools.pairwise(boundaries)):
        raw = key[:, :, start:stop], value[:, :, start:stop]
        chosen = None if selection is None else of_sequence(selection, rule, boundaries, index)
        compact = compact_buffer(*raw, rule, chosen)
        queries = query[:, :, start : stop - offset]
        outputs.append(attend(queries, compact, raw, rule, scale=scale, query_offset=offset))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)


def attend(
    query: Tensor,
    compact: tuple[Tensor, Tensor],
    raw: tuple[Tensor, Tensor],
    rule: Rule,
    *,
    scale: float,
    query_offset: int = 0,
    raw_offset: int = 0,
) -> Tensor:
    """Attention of one sequence's queries over its compact buffer and its raw tokens.

    Args:
        query: (B, Hq, Tq, D), the tokens at positions ``query_offset`` … of their sequence.
        compact: keys and values (B, H, >= S + K P, D): sinks, then the pairs kept of each partition.
        raw: keys and values (B, H, Tr, D) of the tokens at positions ``raw_offset`` ….
        rule: the rule.
        scale: factor of the scores before the softmax.
        query_offset: position of the first query.
        raw_offset: position of the first raw token, at most the raw start of the first query.

    Returns:
        (B, Hq, Tq, D) in the query's dtype.
    """
    heads = raw[0].shape[1]
    grouped = query.unflatten(1, (heads, -1))  # (B, H, G, Tq, D)
    parts = []
    for span in spans(query_offset, query_offset + query.shape[2], rule):
        keys, values = (_visible(*pair, span, rule, raw_offset) for pair in zip(compact, raw, strict=True))
        piece = grouped[..., span.start - query_offset : span.stop - query_offset, :]
        parts.append(causal_attention(piece, keys, values, scale))
    return torch.cat(parts, dim=-2).flatten(1, 2)


def attend_one(query: Tensor, key: Tensor, value: Tensor, length: Tensor, scale: float) -> Tensor:
    """Attention of one query per row over the filled part of a buffer.

    Args:
        query: (B, Hq, 1, D).
        key: (B, H, capacity, D).
        value: (B, H, capacity, D).
        length: int32, filled keys of each row (B,) or of all (1,); on the device, so that its values may change under a
            CUDA graph.
        scale: factor of the scores.

    Returns:
        (B, Hq, 1, D).
    """
    filled = torch.arange(key.shape[2], device=key.device) < length[:, None]  # (B or 1, capacity)
    # What stands behind it may be NaN, which neither a mask nor a weight of zero takes out.
    key, value = (rows.masked_fill(~filled[:, None, :, None], 0.0) for rows in (key, value))
    grouped = query.unflatten(1, (key.shape[1], -1)).flatten(2, 3)
    visible = filled[:, None, None]
    output: Tensor = functional.scaled_dot_product_attention(grouped, key, value, attn_mask=visible, scale=scale)
    return output.reshape(query.shape)


def compress(key: Tensor, value: Tensor, rule: Rule, count: int, first: int) -> tuple[Tensor, Tensor]:
    """What ``count`` partitions of a sequence become.

    Args:
        key: (B, H, T, D), T >= (count + 1) L, from the start of the first of them on.
        value: the same of the values.
        rule: the rule.
        count: partitions to compress; each is judged against the one after it.
        first: ordinal of the first of them in its sequence.

    Returns:
        Keys and values (B, H, count K, D).
    """
    return compress_partitions(partitions_of(key, value, rule, count, first), rule)


def _visible(compact: Tensor, raw: Tensor, span: Span, rule: Rule, raw_offset: int) -> Tensor:
    """Keys (or values) that some query of the span sees, in order: (B, H, S + K P + raw, D)."""
    recent = raw[:, :, raw_start(span.partitions, rule) - raw_offset : span.stop - raw_offset]
    if span.partitions == 0:
        return recent
    return torch.cat([compact[:, :, : compact_size(span.partitions, rule)], recent], dim=2)


def causal_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Dense attention of the last N of M positions, bottom-right causal.

    Args:
        query: (B, H, G, N, D), the G query heads of each key-value head.
        key: (B, H, M, D).
        value: (B, H, M, D).
        scale: factor of the scores before the softmax.

    Returns:
        (B, H, G, N, D).
    """
    group, count = query.shape[2:4]
    visible = None
    if count > 1:
        mask = torch.ones(count, key.shape[2], dtype=torch.bool, device=query.device).tril(key.shape[2] - count)
        visible = mask.repeat(group, 1)
    # The query heads of a group share their keys: fold them into the rows of one product instead of repeating keys.
    folded: Tensor = functional.scaled_dot_product_attention(
        query.flatten(2, 3), key, value, attn_mask=visible, scale=scale
    )
    return folded.reshape(*query.shape[:-1], value.shape[-1])
