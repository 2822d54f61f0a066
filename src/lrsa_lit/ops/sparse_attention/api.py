"""The public operator: check the arguments once, pick an implementation, run it.

Dimensions: B batch, H key-value heads, Hq query heads, T tokens, D head_dim, N packed sequences, P partitions.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
import logging
from collections.abc import Sequence
from types import ModuleType
from typing import Literal, get_args

import torch
from torch import Tensor

from lrsa_lit.errors import UserError
from lrsa_lit.ops.sparse_attention import eager
from lrsa_lit.ops.sparse_attention.geometry import checked_boundaries, compressed_at, partition_counts, raw_start
from lrsa_lit.ops.sparse_attention.rule import HasRule, Rule, rule_of
from lrsa_lit.ops.sparse_attention.selection import Selection, select_packed

Impl = Literal["auto", "eager", "triton"]

_log = logging.getLogger(__name__)


def sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rule: Rule | HasRule,
    *,
    cu_seqlens: Tensor | None = None,
    scale: float | None = None,
    selection: Selection | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """Lag-relative sparse attention (arXiv 2506.11498): causal attention over sinks, kept pairs and recent tokens.

    Args:
        query: (B, Hq, Tq, D). Usually Tq = T; with Tq < T the queries are the last Tq of the T tokens.
        key: (B, H, T, D), rotated, H dividing Hq.
        value: (B, H, T, D).
        rule: the rule, or what has one, such as an ``LRSAConfig``; it may change from call to call at no cost.
        cu_seqlens: int32 (N + 1,), boundaries 0 … T of N sequences packed in one row (B = 1); none sees another.
        scale: factor of the scores; default D ** -0.5.
        selection: what the partitions keep, as :func:`select` returned it; default: the rule's compressor decides.
        impl: ``"eager"``, ``"triton"``, or ``"auto"`` for the fastest that the device has.

    Returns:
        (B, Hq, Tq, D) in the query's dtype.

    Raises:
        UserError: arguments that do not fit together, or an implementation that cannot run here.
    """
    rule = rule_of(rule)
    check_tensors(query, key, value)
    boundaries = _boundaries(cu_seqlens, key, query)
    if selection is not None:
        _check_selection(selection, key, rule, boundaries)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    output: Tensor = implementation(impl, query).forward(
        query, key, value, rule, boundaries=boundaries, scale=scale, selection=selection
    )
    return output


def select(
    key: Tensor, value: Tensor, rule: Rule | HasRule, *, cu_seqlens: Tensor | None = None, impl: Impl = "auto"
) -> Selection:
    """Positions and scores of what each partition keeps by the time the last token attends.

    Args:
        key: (B, H, T, D), rotated.
        value: (B, H, T, D).
        rule: the rule, with a compressor that selects.
        cu_seqlens: int32 (N + 1,) boundaries of packed sequences (B = 1).
        impl: as in :func:`sparse_attention`, which keeps the same tokens.

    Raises:
        UserError: arguments that do not fit together, or a compressor that makes new pairs.
    """
    rule = rule_of(rule)
    check_tensors(key, key, value)
    boundaries = _boundaries(cu_seqlens, key, key)
    chosen = _choose(impl, key.device.type, key.dtype, key.shape[-1])
    if chosen == "eager":
        return select_packed(key, value, rule, boundaries)
    selection: Selection = _triton().select(key, value, rule, boundaries)
    return selection


@torch.no_grad()
def visibility_mask(key: Tensor, value: Tensor, rule: Rule | HasRule, *, cu_seqlens: Tensor | None = None) -> Tensor:
    """Which keys each query sees: bool (B, H, T queries, T keys). For tests and analysis; memory T x T per head."""
    check_tensors(key, key, value)
    batch, heads, length, _ = key.shape
    mask = torch.zeros(batch, heads, length, length, dtype=torch.bool, device=key.device)
    for start, stop in itertools.pairwise(_boundaries(cu_seqlens, key, key)):
        block = slice(start, stop)
        mask[:, :, block, block] = _visible(key[:, :, block], value[:, :, block], rule_of(rule))
    return mask


def _visible(key: Tensor, value: Tensor, rule: Rule) -> Tensor:
    """The mask of one sequence, written as the definition reads: (B, H, T, T)."""
    batch, heads, length, _ = key.shape
    position = torch.arange(length, device=key.device)
    compressed = compressed_at(position, rule)[:, None]
    kept = torch.zeros(batch, heads, length, dtype=torch.bool, device=key.device)
    kept.scatter_(2, select_packed(key, value, rule, (0, length)).indices.flatten(2), True)
    partition = (position - rule.sink_size).div(rule.lag_size, rounding_mode="floor")
    sink = position < rule.sink_size
    raw = position >= raw_start(compressed, rule)
    compact = kept[:, :, None, :] & (partition >= 0) & (partition < compressed)
    return (position <= position[:, None]) & (sink | raw | compact)


def attend_one(
    query: Tensor, key: Tensor, value: Tensor, length: Tensor, scale: float, *, impl: Impl = "auto"
) -> Tensor:
    """Attention of one query per row over the filled part of a buffer; arguments as in ``eager.attend_one``."""
    output: Tensor = implementation(impl, query).attend_one(query, key, value, length, scale)
    return output


def implementation(impl: str, query: Tensor) -> ModuleType:
    """The module that runs the operator on such tensors, with ``forward``, ``attend`` and ``compress``.

    Raises:
        UserError: no such implementation, or one that cannot run here.
    """
    chosen = _choose(impl, query.device.type, query.dtype, query.shape[-1])
    return eager if chosen == "eager" else _triton()


def _choose(impl: str, device: str, dtype: torch.dtype, dim: int) -> str:
    """The implementation's name; a constant for torch.compile, which traces neither the cache nor the checks."""
    return _decide(impl, device, dtype, dim)


# What torch.compiler.assume_constant_result does, without importing the compiler, which would import triton.
_choose._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.lru_cache
def _decide(impl: str, device: str, dtype: torch.dtype, dim: int) -> str:
    """Cached, so that the choice of ``auto`` and its reason are logged once."""
    if impl not in get_args(Impl):
        raise UserError("impl", impl, f"one of {', '.join(get_args(Impl))}")
    if impl == "eager":
        return impl
    if impl == "auto" and device != "cuda":
        _log.info("sparse_attention on %s runs impl=eager", device)
        return "eager"
    refusal = _no_triton(device, dtype, dim)
    if impl == "triton" and refusal is not None:
        raise refusal
    if refusal is not None:
        _log.warning("sparse_attention on %s runs impl=eager, which is slow: %s", device, refusal)
        return "eager"
    _log.info("sparse_attention on %s runs impl=triton", device)
    return "triton"


def _no_triton(device: str, dtype: torch.dtype, dim: int) -> UserError | None:
    """Why the Triton kernels cannot run, None if they can."""
    if importlib.util.find_spec("triton") is None:
        return UserError("impl", "triton", reason="needs the package triton, which is not installed; use eager")
    refusal: UserError | None = _triton().unsupported(device, dtype, dim)
    return refusal


def _triton() -> ModuleType:
    """The Triton implementation, imported where one is asked for: there is no triton wheel for every platform."""
    from lrsa_lit.ops.sparse_attention.triton import launch

    return launch


def check_tensors(query: Tensor, key: Tensor, value: Tensor) -> None:
    """Refuse queries, keys and values that do not fit together.

    Raises:
        UserError: they do not; see :func:`sparse_attention` for what they must be.
    """
    if query.ndim != 4 or key.ndim != 4:
        raise UserError("query, key", (_shape(query), _shape(key)), "(B, heads, T, D) both")
    if key.shape != value.shape:
        raise UserError("value", _shape(value), f"of the shape of key, {_shape(key)}")
    batch, query_heads, queries, dim = query.shape
    if (batch, dim) != (key.shape[0], key.shape[3]):
        raise UserError("key", _shape(key), f"of the B and D of query, {_shape(query)}")
    if min(query_heads, key.shape[1]) == 0 or query_heads % key.shape[1]:
        allowed = f"of a multiple of the {key.shape[1]} key-value heads"
        raise UserError("query", _shape(query), allowed, reason=f"has {query_heads} heads")
    if not 1 <= queries <= key.shape[2]:
        allowed = f"of 1 to {key.shape[2]} tokens, as there are so many keys"
        raise UserError("query", _shape(query), allowed, reason=f"has {queries} tokens")
    if not query.dtype == key.dtype == value.dtype or not query.is_floating_point():
        raise UserError("dtype", (query.dtype, key.dtype, value.dtype), "one floating dtype for all three")
    if not query.device == key.device == value.device:
        raise UserError("device", f"{query.device}, {key.device}, {value.device}", "one device for all three")


def _boundaries(cu_seqlens: Tensor | None, key: Tensor, query: Tensor) -> Sequence[int]:
    """Sequence boundaries as integers, 0 … T; empty sequences are dropped."""
    length = key.shape[2]
    if cu_seqlens is None:
        return (0, length)
    check_packing(cu_seqlens, key, query)
    return checked_boundaries(cu_seqlens.tolist(), length)


def check_packing(cu_seqlens: Tensor, key: Tensor, query: Tensor) -> None:
    """Refuse boundaries that are no such tensor, or of rows that cannot be packed; their values are not read.

    Raises:
        UserError: so it is.
    """
    length = key.shape[2]
    if not isinstance(cu_seqlens, Tensor):
        raise UserError("cu_seqlens", type(cu_seqlens).__name__, "an int32 tensor (N + 1,)")
    if key.shape[0] != 1 or query.shape[2] != length:
        given = f"got B = {key.shape[0]}, {query.shape[2]} queries and {length} keys"
        raise UserError("cu_seqlens", reason=f"packed rows need B = 1 and a query for each key; {given}")
    if cu_seqlens.ndim != 1 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise UserError("cu_seqlens", (cu_seqlens.dtype, *_shape(cu_seqlens)), "int32 (N + 1,)")


def _check_selection(selection: Selection, key: Tensor, rule: Rule, boundaries: Sequence[int]) -> None:
    """Too few indices would shorten the compact buffer without a word."""
    needed = (*key.shape[:2], sum(partition_counts(boundaries, rule)), rule.top_k)
    if _shape(selection.indices) != needed:
        raise UserError("selection", _shape(selection.indices), f"indices {needed} for this rule and these keys")


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)
