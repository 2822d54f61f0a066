"""Attention at a budget: the largest rule or system whose cache is no more than a share of a dense one."""

from __future__ import annotations

import bisect
import dataclasses
import math
from typing import Any

from lrsa_lit.attention.budgets import heads_of, mean_top_k
from lrsa_lit.attention.config import LRSAConfig
from lrsa_lit.bounds import is_weight
from lrsa_lit.errors import UserError
from lrsa_lit.ops.sparse_attention import stored_queries, stored_size
from lrsa_lit.ops.sparse_attention.slot_bias import CHANNELS
from lrsa_lit.systems.system import Head


def head_of(config: Any, itemsize: int) -> Head:
    """The key-value heads of a model.

    Args:
        config: the model's, of its text.
        itemsize: bytes of a number in its cache.
    """
    heads = config.num_attention_heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return Head(heads // heads_of(config), dim, itemsize)


def at_budget(config: LRSAConfig, share: float, tokens: int, layers: int, head: Head) -> LRSAConfig:
    """The attention with the largest K, or size of its system, whose cache does not exceed a share of a dense one.

    The cache is that at the end of a prompt of so many tokens, averaged over layers and heads: sinks, windows, dense
    layers and queries that wait are in it. S, L and the dense layers stay as they are.

    Raises:
        UserError: the share is less than what always stays, more than 1 or none, or the system has no size.
    """
    if not (is_weight(share) and 0 < share <= 1):
        raise UserError("budget", share, "above 0 and at most 1")
    system, dense = config.system, len(config.dense_layers)
    if config.head_top_k is not None:
        raise UserError("budget", share, reason="is not allowed beside head_top_k, whose heads have budgets")
    if system is not None and not system.budget_field:
        raise UserError("budget", share, reason=f"is not allowed; {type(system).__name__} has no size to set")
    if dense >= layers:
        return config
    # A share such as .1 of 20 layers is a little more or less than 2.
    in_dense = dense * tokens * _dense_bytes(config, head)
    allowed = (share * tokens * layers * head.pair - in_dense) / (layers - dense) + 1e-6
    found = _rule_at_most(config, allowed, tokens, head) if system is None else system.at_most(allowed, tokens, head)
    if found is None:
        raise _below_floor(config, share, tokens, layers, head)
    return config.replace(**({"top_k": found} if isinstance(found, int) else {"system": found}))


def cache_share(config: LRSAConfig, tokens: int, layers: int, head: Head) -> float:
    """The bytes at the end of a prompt of so many tokens as a share of a dense cache's, mean of layers and heads."""
    system, rule, dense = config.system, config.rule, len(config.dense_layers)
    if config.head_top_k is not None:
        # Bytes are linear in K, and as many as a dense cache has at K = L.
        none, one = (_bytes(config, top_k, tokens, head) for top_k in (0, 1))
        return (none + float(mean_top_k(config, layers)) * (one - none)) / (tokens * head.pair)
    held = _bytes(config, rule.top_k, tokens, head) if system is None else system.held_bytes(tokens, head)
    return (dense * _dense_bytes(config, head) + (layers - dense) * held / tokens) / (layers * head.pair)


def _bytes(config: LRSAConfig, top_k: int, tokens: int, head: Head) -> float:
    """What a head holds of so many tokens in a layer that is not dense."""
    rule = config.rule.replace(top_k=top_k)
    queries = dataclasses.replace(head, dim=head.dim + rule.compressor.has_bias * CHANNELS).queries
    return stored_size(tokens, rule) * _stored_bytes(config, head) + stored_queries(tokens, rule) * queries


def _dense_bytes(config: LRSAConfig, head: Head) -> float:
    """What a head holds of a token in a dense layer."""
    if not config.latents:
        return head.pair
    if head.latent is None:
        raise UserError("latents", reason="are not there: the model's keys and values are not made from any")
    return head.latent


def _stored_bytes(config: LRSAConfig, head: Head) -> float:
    """What a head holds of a token that a rule keeps."""
    if config.latents:
        return _dense_bytes(config, head)
    compressor = config.compressor
    dim = head.dim + compressor.has_bias * CHANNELS
    return dataclasses.replace(head, dim=dim).pair + compressor.takes_scores * CHANNELS * head.itemsize


def _rule_at_most(config: LRSAConfig, allowed: float, tokens: int, head: Head) -> int | None:
    """The largest K with which no more is held; None if no K does."""
    choices = range(config.lag_size + 1)
    count = bisect.bisect_right(choices, allowed, key=lambda top_k: _bytes(config, top_k, tokens, head))
    return choices[count - 1] if count else None


def _below_floor(config: LRSAConfig, share: float, tokens: int, layers: int, head: Head) -> UserError:
    """What always stays, in the words of a setting."""
    system, dense = config.system, len(config.dense_layers)
    if system is None:
        least = _bytes(config, 0, tokens, head) / head.pair
        raw = least * head.pair / _stored_bytes(config, head) - config.sink_size
        window, sinks = f"{raw:.0f} of the window", f"{config.sink_size} sinks"
        what = f"{sinks} and {window} stay"
    else:
        least = system.sized(system.floor(tokens)).held_bytes(tokens, head) / head.pair
        what = f"{least:g} pairs stay, sinks and windows among them"
    in_dense = dense * tokens * _dense_bytes(config, head) / head.pair
    lowest = math.ceil(1e4 * (least * (layers - dense) + in_dense) / (layers * tokens) - 1e-6) / 1e4
    of = f"at {tokens} tokens, where {what}" + (f", and all of {dense} dense layers" if dense else "")
    name = type(config.compressor if system is None else system).__name__
    return UserError("budget", share, f"at least {lowest:.4f} for {name} {of}")
