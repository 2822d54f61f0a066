"""Which tokens each partition keeps, for whole sequences and packed ones.

Dimensions: B batch, H key-value heads, Hq query heads, G of each key-value head, T tokens, Tq of them with a query, P
partitions, L lag_size, K top_k, D head_dim, w window of the compressor.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lrsa_lit.errors import UserError
from lrsa_lit.ops.sparse_attention.buffer import Pair, joined
from lrsa_lit.ops.sparse_attention.compressors import Partitions, Selector, gather_kept
from lrsa_lit.ops.sparse_attention.geometry import compressed_at, partition_counts, window_start
from lrsa_lit.ops.sparse_attention.rule import Rule
from lrsa_lit.ops.sparse_attention.slot_bias import narrow, with_bias
from lrsa_lit.ops.sparse_attention.token_scores import bare_keys, scores_of


@dataclass(frozen=True)
class Selection:
    """What was kept, of packed sequences one after the other.

    Attributes:
        indices: (B, H, P, K) int64, positions from the row's start, ascending within a partition.
        scores: (B, H, P, L), of the tokens. Where one token dominates, the others' can round to 0; the kept are still
            those that exact scores rank highest.
    """

    indices: Tensor
    scores: Tensor


def windows_of(query: Tensor | None, key: Tensor, rule: Rule, count: int) -> Tensor | None:
    """The queries by which the first ``count`` partitions of a sequence are judged.

    Args:
        query: (B, Hq, Tq, D), of the last Tq of the sequence's tokens.
        key: (B, H, T, D).
        rule: the rule.
        count: partitions.

    Returns:
        (B, H, G, P, w, D), views; None where the compressor asks for none.

    Raises:
        UserError: it asks for some that are not among the given ones.
    """
    window = rule.compressor.window
    if window == 0:
        return None
    first, given = window_start(1, rule), 0 if query is None else query.shape[2]
    if query is None or first < key.shape[2] - given:
        needs = f"{type(rule.compressor).__name__} needs those of tokens {first} to {key.shape[2] - 1}"
        hint = "pass them, or decode with an LRSACache, which remembers them"
        raise UserError("query", reason=f"{needs}, and the last {given} are given", hint=hint)
    # (B, Hq, P, D, w)
    windows = query[:, :, first - (key.shape[2] - given) :].unfold(2, window, rule.lag_size)[:, :, :count]
    grouped: Tensor = windows.transpose(-1, -2).unflatten(1, (key.shape[1], -1))
    return grouped


def partitions_of(
    key: Tensor, value: Tensor, rule: Rule, count: int, first: int = 0, next_query: Tensor | None = None
) -> Partitions:
    """Views of ``count`` partitions, with their references; arguments as in :func:`compress`."""
    if rule.compressor.needs_rotary and rule.rotary is None:
        reason = "works on keys without their rotation, which only a model's rule knows: give the rule a Rotary"
        raise UserError("compressor", type(rule.compressor).__name__, reason=reason)
    stop, lag = (count + 1) * rule.lag_size, rule.lag_size
    keys, scores = bare_keys(key, value, rule.compressor), None
    if rule.compressor.takes_scores:
        scores = scores_of(key[:, :, : stop - lag]).unflatten(2, (count, lag))
    keys = keys[:, :, :stop].unflatten(2, (count + 1, lag))
    values = value[:, :, :stop].unflatten(2, (count + 1, lag))
    pairs = keys[:, :, :-1], values[:, :, :-1], keys[:, :, 1:], values[:, :, 1:]
    start = rule.sink_size + first * rule.lag_size
    return Partitions(*pairs, rule.top_k, first, next_query, start, rule.rotary, scores)


def select_sequence(key: Tensor, value: Tensor, rule: Rule, query: Tensor | None = None) -> Selection:
    """What the partitions of one sequence (B, H, T, D) keep by the time of its last query; (B, Hq, Tq, D) are its last.

    Only compressors with a window need the queries.
    """
    if not isinstance(rule.compressor, Selector):
        name = type(rule.compressor).__name__
        raise UserError("compressor", name, "a Selector", reason="makes new pairs and selects none")
    count, sink = compressed_at(key.shape[2] - 1, rule), rule.sink_size
    if count == 0:
        empty = key.new_empty((*key.shape[:2], 0, rule.lag_size), dtype=torch.float32)
        return Selection(empty.new_empty((*key.shape[:2], 0, rule.top_k), dtype=torch.int64), empty)
    windows = windows_of(query, key, rule, count)
    parts = partitions_of(key[:, :, sink:], value[:, :, sink:], rule, count, next_query=windows)
    indices, scores = rule.compressor.keep(parts)
    starts = sink + rule.lag_size * torch.arange(count, device=key.device)
    return Selection(indices + starts[:, None], scores)


def select(key: Tensor, value: Tensor, rule: Rule, boundaries: Sequence[int], query: Tensor | None = None) -> Selection:
    """:func:`select_sequence` of each sequence [boundaries[n], boundaries[n+1]) of a packed row."""
    parts = [
        (start, select_sequence(key[:, :, start:stop], value[:, :, start:stop], rule, queries))
        for (start, stop), queries in zip(
            itertools.pairwise(boundaries), queries_of(query, key, boundaries), strict=True
        )
    ]
    return Selection(
        torch.cat([part.indices + start for start, part in parts], dim=2),
        torch.cat([part.scores for _, part in parts], dim=2),
    )


def queries_of(query: Tensor | None, key: Tensor, boundaries: Sequence[int]) -> list[Tensor | None]:
    """The queries (B, Hq, Tq, D) of each sequence; only a single one may have fewer of them than keys (B, H, T, D)."""
    if query is None:
        return [None] * (len(boundaries) - 1)
    offset = key.shape[2] - query.shape[2]
    return [query[:, :, start : stop - offset] for start, stop in itertools.pairwise(boundaries)]


def of_sequence(selection: Selection, rule: Rule, boundaries: Sequence[int], index: int) -> Selection:
    """The part of a packed row's selection that belongs to one sequence, counted from that sequence's start."""
    counts = partition_counts(boundaries[: index + 2], rule)
    part = slice(sum(counts[:-1]), sum(counts))
    return Selection(selection.indices[:, :, part] - boundaries[index], selection.scores[:, :, part])


def compact_buffer(
    key: Tensor, value: Tensor, rule: Rule, selection: Selection | None = None, query: Tensor | None = None,
    compress_by: Callable[..., Pair] | None = None,
) -> Pair:  # fmt: skip
    """Sinks and compressed partitions of one sequence: keys and values (B, H, S + K P, D), empty where P = 0.

    A ready selection replaces the compressor's own; its positions count from the sequence's start. Without one, a
    compressor with a window needs the sequence's last queries (B, Hq, Tq, D). ``compress_by`` stands in for
    :func:`compress`.
    """
    count = compressed_at(key.shape[2] - 1, rule)
    if count == 0:
        return key[:, :, :0], value[:, :, :0]
    sink = rule.sink_size
    if selection is None:
        windows = windows_of(query, key, rule, count)
        kept = (compress_by or compress)(key[:, :, sink:], value[:, :, sink:], rule, count, next_query=windows)
    else:
        indices = selection.indices.flatten(2, 3)
        kept = gather_kept(key, indices), gather_kept(value, indices)
    return joined((key[:, :, :sink], value[:, :, :sink]), kept)


def compress(
    key: Tensor, value: Tensor, rule: Rule, count: int, first: int = 0, next_query: Tensor | None = None
) -> Pair:
    """What ``count`` partitions of a sequence become, one after the other.

    Args:
        key: (B, H, >= (count + 1) L, D), from the start of the first of them on.
        value: the same of the values.
        rule: the rule.
        count: partitions to compress; each is judged against the one after it.
        first: ordinal of the first of them in its sequence.
        next_query: (B, H, G, count, w, D), of each partition's reference, if the compressor asks for them.

    Returns:
        Keys and values (B, H, count K, D).

    With a compressor that has a bias, everything has the channels for it; with one that takes scores, the given keys
    alone have those for them.
    """
    if not rule.compressor.has_bias:
        compact = rule.compressor.compress(partitions_of(key, value, rule, count, first, next_query))
    else:
        next_query = None if next_query is None else narrow(next_query)
        parts = partitions_of(narrow(key), narrow(value), rule, count, first, next_query)
        compact = with_bias(*rule.compressor.compress(parts))
    compact_key, compact_value = compact
    return compact_key.flatten(2, 3), compact_value.flatten(2, 3)
