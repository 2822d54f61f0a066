"""Attention at a cache budget: the largest K or system size whose cache fits a share of a dense cache."""

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
    """The sizes of a model's key-value heads.

    Args:
        config: the config of the text model.
        itemsize: bytes per number in the cache.
    """
    heads = config.num_attention_heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return Head(heads // heads_of(config), dim, itemsize)


def at_budget(config: LRSAConfig, share: float, tokens: int, layers: int, head: Head) -> LRSAConfig:
    """The config with the largest K, or the largest size of its system, whose cache fits a share of a dense cache.

    The cache is measured at the end of a prompt of ``tokens``, averaged over layers and heads. It includes sinks,
    windows, dense layers and stored queries. S, L and the dense layers do not change.

    Raises:
        UserError: the share is not in (0, 1], is smaller than what is always kept, is used with ``head_top_k``, or the
            system has no size.
    """
    if not (is_weight(share) and 0 < share <= 1):
        raise UserError("budget", share, "above 0 and at most 1")
    system, dense = config.system, len(config.dense_layers)
    if config.head_top_k is not None:
        raise UserError("budget", share, reason="is not allowed with head_top_k, which already sets budgets")
    if system is not None and not system.budget_field:
        raise UserError("budget", share, reason=f"is not allowed; {type(system).__name__} has no size to set")
    if dense >= layers:
        return config
    # Tolerance for rounding: 0.1 of 20 layers may come out slightly above or below 2.
    in_dense = dense * tokens * _dense_bytes(config, head)
    allowed = (share * tokens * layers * head.pair - in_dense) / (layers - dense) + 1e-6
    found = _rule_at_most(config, allowed, tokens, head) if system is None else system.at_most(allowed, tokens, head)
    if found is None:
        raise _below_floor(config, share, tokens, layers, head)
    return config.replace(**({"top_k": found} if isinstance(found, int) else {"system": found}))


def cache_share(config: LRSAConfig, tokens: int, layers: int, head: Head) -> float:
    """Cache bytes at the end of a prompt of ``tokens`` as a share of a dense cache, mean over layers and heads."""
    system, rule, dense = config.system, config.rule, len(config.dense_layers)
    if config.head_top_k is not None:
        # Bytes are linear in K, and K = L gives the bytes of a dense cache.
        none, one = (_bytes(config, top_k, tokens, head) for top_k in (0, 1))
        return (none + float(mean_top_k(config, layers)) * (one - none)) / (tokens * head.pair)
    held = _bytes(config, rule.top_k, tokens, head) if system is None else system.held_bytes(tokens, head)
    return (dense * _dense_bytes(config, head) + (layers - dense) * held / tokens) / (layers * head.pair)


def _bytes(config: LRSAConfig, top_k: int, tokens: int, head: Head) -> float:
    """Bytes that a head with this K holds after ``tokens``, in a layer that is not dense."""
    rule = config.rule.replace(top_k=top_k)
    queries = dataclasses.replace(head, dim=head.dim + rule.compressor.has_bias * CHANNELS).queries
    return stored_size(tokens, rule) * _stored_bytes(config, head) + stored_queries(tokens, rule) * queries


def _dense_bytes(config: LRSAConfig, head: Head) -> float:
    """Bytes per token and head in a dense layer."""
    if not config.latents:
        return head.pair
    if head.latent is None:
        raise UserError("latents", reason="do not exist: the model does not make keys and values from latents")
    return head.latent


def _stored_bytes(config: LRSAConfig, head: Head) -> float:
    """Bytes per kept token and head in a layer with a rule."""
    if config.latents:
        return _dense_bytes(config, head)
    compressor = config.compressor
    dim = head.dim + compressor.has_bias * CHANNELS
    return dataclasses.replace(head, dim=dim).pair + compressor.takes_scores * CHANNELS * head.itemsize


def _rule_at_most(config: LRSAConfig, allowed: float, tokens: int, head: Head) -> int | None:
    """The largest K whose cache holds at most ``allowed`` bytes; None if there is none."""
    choices = range(config.lag_size + 1)
    count = bisect.bisect_right(choices, allowed, key=lambda top_k: _bytes(config, top_k, tokens, head))
    return choices[count - 1] if count else None


def _below_floor(config: LRSAConfig, share: float, tokens: int, layers: int, head: Head) -> UserError:
    """The error that names the smallest possible share."""
    system, dense = config.system, len(config.dense_layers)
    if system is None:
        least = _bytes(config, 0, tokens, head) / head.pair
        raw = least * head.pair / _stored_bytes(config, head) - config.sink_size
        window, sinks = f"{raw:.0f} window tokens", f"{config.sink_size} sinks"
        what = f"{sinks} and {window} are always kept"
    else:
        least = system.sized(system.floor(tokens)).held_bytes(tokens, head) / head.pair
        what = f"{least:g} pairs are always kept, including sinks and windows"
    in_dense = dense * tokens * _dense_bytes(config, head) / head.pair
    lowest = math.ceil(1e4 * (least * (layers - dense) + in_dense) / (layers * tokens) - 1e-6) / 1e4
    of = f"at {tokens} tokens, where {what}" + (f", and all of {dense} dense layers" if dense else "")
    name = type(config.compressor if system is None else system).__name__
    return UserError("budget", share, f"at least {lowest:.4f} for {name} {of}")
