"""Which tokens each partition keeps, for whole sequences and packed ones.

Dimensions: B batch, H key-value heads, Hq query heads, G query heads per key-value head, T tokens, Tq tokens with a
query, P partitions, L lag_size, K top_k, D head_dim, w window of the compressor.
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
from lrsa_lit.ops.to_device import to_device


@dataclass(frozen=True)
class Selection:
    """The kept tokens of each partition; the partitions of packed sequences follow one another.

    Attributes:
        indices: (B, H, P, K) int64, positions in the row, ascending within a partition.
        scores: (B, H, P, L), of all tokens. If one token dominates, the scores of others can round to 0, but the tokens
            with the highest exact scores are kept even then.
    """

    indices: Tensor
    scores: Tensor


def windows_of(query: Tensor | None, key: Tensor, rule: Rule, count: int) -> Tensor | None:
    """The queries by which the first ``count`` partitions of a sequence are scored.

    Args:
        query: (B, Hq, Tq, D), of the sequence's last Tq tokens.
        key: (B, H, T, D).
        rule: the rule.
        count: the number of partitions.

    Returns:
        (B, H, G, P, w, D), a view; None if the compressor needs no queries.

    Raises:
        UserError: the compressor needs queries that were not given.
    """
    window = rule.compressor.window
    if window == 0:
        return None
    first, given = window_start(1, rule), 0 if query is None else query.shape[2]
    if query is None or first < key.shape[2] - given:
        needs = f"{type(rule.compressor).__name__} needs the queries of tokens {first} to {key.shape[2] - 1}"
        hint = "pass them, or decode with an LRSACache, which stores them"
        raise UserError("query", reason=f"{needs}, but only the last {given} were given", hint=hint)
    # (B, Hq, P, D, w)
    windows = query[:, :, first - (key.shape[2] - given) :].unfold(2, window, rule.lag_size)[:, :, :count]
    grouped: Tensor = windows.transpose(-1, -2).unflatten(1, (key.shape[1], -1))
    return grouped


def partitions_of(
    key: Tensor, value: Tensor, rule: Rule, count: int, first: int = 0, next_query: Tensor | None = None
) -> Partitions:
    """Views of ``count`` partitions and their references; the arguments are those of :func:`compress`."""
    _check_rotary(rule)
    stop, lag = (count + 1) * rule.lag_size, rule.lag_size
    keys, scores = bare_keys(key, value, rule.compressor), None
    if rule.compressor.takes_scores:
        scores = scores_of(key[:, :, : stop - lag]).unflatten(2, (count, lag))
    keys = keys[:, :, :stop].unflatten(2, (count + 1, lag))
    values = value[:, :, :stop].unflatten(2, (count + 1, lag))
    pairs = keys[:, :, :-1], values[:, :, :-1], keys[:, :, 1:], values[:, :, 1:]
    start = rule.sink_size + first * rule.lag_size
    return Partitions(*pairs, rule.top_k, first, next_query, start, rule.rotary, scores)


def _check_rotary(rule: Rule) -> None:
    if rule.compressor.needs_rotary and rule.rotary is None:
        reason = "works on keys without their rotation, so the rule needs a Rotary; enabling LRSA on a model sets it"
        raise UserError("compressor", type(rule.compressor).__name__, reason=reason)


def select_sequence(key: Tensor, value: Tensor, rule: Rule, query: Tensor | None = None) -> Selection:
    """The tokens that the partitions of one sequence (B, H, T, D) have kept when its last query attends.

    Only compressors with a window need ``query``, the sequence's last queries (B, Hq, Tq, D).
    """
    if not isinstance(rule.compressor, Selector):
        name = type(rule.compressor).__name__
        raise UserError("compressor", name, "a Selector", reason="makes new pairs instead of selecting tokens")
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
    """:func:`select_sequence` for each sequence [boundaries[n], boundaries[n+1]) of a packed row."""
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
    """The queries (B, Hq, Tq, D) of each sequence. Only a single sequence may have fewer queries than keys."""
    if query is None:
        return [None] * (len(boundaries) - 1)
    offset = key.shape[2] - query.shape[2]
    return [query[:, :, start : stop - offset] for start, stop in itertools.pairwise(boundaries)]


def of_sequence(selection: Selection, rule: Rule, boundaries: Sequence[int], index: int) -> Selection:
    """One sequence's part of a packed row's selection, with positions counted from the sequence's start."""
    counts = partition_counts(boundaries[: index + 2], rule)
    part = slice(sum(counts[:-1]), sum(counts))
    return Selection(selection.indices[:, :, part] - boundaries[index], selection.scores[:, :, part])


def compact_buffer(
    key: Tensor, value: Tensor, rule: Rule, selection: Selection | None = None, query: Tensor | None = None,
    compress_by: Callable[..., Pair] | None = None,
) -> Pair:  # fmt: skip
    """Sinks and compressed partitions of one sequence: keys and values (B, H, S + K P, D), empty if P = 0.

    A given selection replaces the compressor's; its positions count from the sequence's start. Without a selection, a
    compressor with a window needs the sequence's last queries (B, Hq, Tq, D). ``compress_by`` replaces
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
    """Compress ``count`` consecutive partitions of a sequence.

    Args:
        key: (B, H, >= (count + 1) L, D), starting with the first of these partitions.
        value: the values, likewise.
        rule: the rule.
        count: partitions to compress; each is scored against the one after it.
        first: index of the first of these partitions in its sequence.
        next_query: (B, H, G, count, w, D), the window of each partition's reference, if the compressor needs it.

    Returns:
        Keys and values (B, H, count K, D).

    If the compressor has a bias, all keys, values and queries have its extra channels (slot_bias.py). If it takes
    scores, only the given keys have the extra channels (token_scores.py).
    """
    if not rule.compressor.has_bias:
        compact = rule.compressor.compress(partitions_of(key, value, rule, count, first, next_query))
    else:
        next_query = None if next_query is None else narrow(next_query)
        parts = partitions_of(narrow(key), narrow(value), rule, count, first, next_query)
        compact = with_bias(*rule.compressor.compress(parts))
    compact_key, compact_value = compact
    return compact_key.flatten(2, 3), compact_value.flatten(2, 3)


def compact_buffer_of_packed(
    key: Tensor, value: Tensor, rule: Rule, boundaries: Sequence[int],
    compress_by: Callable[[Partitions], tuple[Tensor, ...]] | None = None,
) -> Pair:  # fmt: skip
    """:func:`compact_buffer` of each sequence of a packed row, one after another, with one call of the compressor.

    Only for a compressor that ignores where partitions are and needs no queries. ``compress_by`` replaces its
    ``compress``.
    """
    _check_rotary(rule)
    counts, sink, lag = partition_counts(boundaries, rule), rule.sink_size, rule.lag_size
    compressed = [(start, count) for start, count in zip(boundaries[:-1], counts, strict=True) if count]
    if not compressed:
        return key[:, :, :0], value[:, :, :0]
    starts = [start + sink + lag * number for start, count in compressed for number in range(count)]
    own = to_device(starts, key.device)[:, None] + torch.arange(lag, device=key.device)
    bias = rule.compressor.has_bias
    keys, values = (narrow(tokens) if bias else tokens for tokens in (key, value))
    pairs = keys[:, :, own], values[:, :, own], keys[:, :, own + lag], values[:, :, own + lag]
    made = (compress_by or rule.compressor.compress)(Partitions(*pairs, rule.top_k, rotary=rule.rotary))
    compact_key, compact_value = with_bias(*made) if bias else made
    kept = (part.split([count for _, count in compressed], dim=2) for part in (compact_key, compact_value))
    parts: list[Pair] = []
    for (start, _), own_key, own_value in zip(compressed, *kept, strict=True):
        sinks = slice(start, start + sink)
        parts += [(key[:, :, sinks], value[:, :, sinks]), (own_key.flatten(2, 3), own_value.flatten(2, 3))]
    return joined(*parts)
