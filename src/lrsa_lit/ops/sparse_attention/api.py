"""The public operator: check the arguments once, pick an implementation, run it.

Dimensions: B batch, H key-value heads, Hq query heads, T tokens, D head_dim, N packed sequences, P partitions.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
from collections.abc import Sequence
from types import ModuleType
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from lrsa_lit.errors import UserError
from lrsa_lit.ops.sparse_attention import eager
from lrsa_lit.ops.sparse_attention import selection as in_pytorch
from lrsa_lit.ops.sparse_attention.geometry import checked_boundaries, partition_counts
from lrsa_lit.ops.sparse_attention.head_rules import HeadRules
from lrsa_lit.ops.sparse_attention.rule import KEEP_ALL, HasRule, Rule, rule_of
from lrsa_lit.ops.sparse_attention.selection import Selection
from lrsa_lit.ops.sparse_attention.slot_bias import through_channels
from lrsa_lit.ops.sparse_attention.token_scores import bare_keys

Impl = Literal["auto", "eager", "triton"]

_log = logging.getLogger(__name__)


def sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rule: Rule | HeadRules | HasRule,
    *,
    cu_seqlens: Tensor | None = None,
    scale: float | None = None,
    selection: Selection | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """Lag-relative sparse attention (arXiv 2506.11498): causal attention over sinks, kept pairs and recent tokens.

    Args:
        query: (B, Hq, Tq, D). Usually Tq = T; with Tq < T the queries are the last Tq of the T tokens.
        key: (B, H, T, D), rotated; H divides Hq. If the compressor takes scores, as :func:`with_scores` returns it.
        value: (B, H, T, D).
        rule: a rule, an object with a ``rule`` such as an ``LRSAConfig``, or :class:`HeadRules` with one K per head.
            It may change between calls at no cost.
        cu_seqlens: int32 (N + 1,), boundaries 0 … T of N sequences packed in one row (B = 1). Sequences do not see
            each other.
        scale: factor of the attention logits; default D ** -0.5.
        selection: the tokens that partitions keep, as :func:`select` returns them. By default the rule's compressor
            chooses.
        impl: ``"eager"``, ``"triton"``, or ``"auto"`` for the fastest on this device.

    Returns:
        (B, Hq, Tq, D) in the query's dtype.

    Raises:
        UserError: the arguments do not fit together, or the implementation cannot run here.
    """
    if isinstance(rule, HeadRules):
        return _attend_by_groups(query, key, value, rule, cu_seqlens, scale, selection, impl)
    rule = rule_of(rule)
    scored, key = key, bare_keys(key, value, rule.compressor)
    _check_tensors(query, key, value)
    boundaries = _boundaries(cu_seqlens, key, query)
    if selection is not None:
        _check_selection(selection, key, rule, boundaries)
    elif rule.compressor.takes_scores:
        selection = in_pytorch.select(scored, value, rule, boundaries)
    scale = query.shape[-1] ** -0.5 if scale is None else scale

    def attend(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        output: Tensor = implementation(impl, query).forward(
            query, key, value, rule, boundaries=boundaries, scale=scale, selection=selection
        )
        return output

    if rule.compressor.has_bias:
        return through_channels(attend, query, key, value, scale)
    return attend(query, key, value, scale)


def _attend_by_groups(
    query: Tensor, key: Tensor, value: Tensor, rules: HeadRules, cu_seqlens: Tensor | None, scale: float | None,
    selection: Selection | None, impl: Impl
) -> Tensor:  # fmt: skip
    if selection is not None:
        raise UserError("selection", reason="is not allowed where heads differ in K")
    _check_tensors(query, bare_keys(key, value, rules.common.compressor), value)

    def attend(query: Tensor, key: Tensor, value: Tensor, rule: Rule) -> Tensor:
        return sparse_attention(query, key, value, rule, cu_seqlens=cu_seqlens, scale=scale, impl=impl)

    return rules.attend(attend, query, key, value)


def dense_attention(
    query: Tensor, key: Tensor, value: Tensor, *, cu_seqlens: Tensor | None = None, scale: float | None = None,
    impl: Impl = "auto"
) -> Tensor:  # fmt: skip
    """Causal attention to the whole past; the arguments are those of :func:`sparse_attention`."""
    return sparse_attention(query, key, value, KEEP_ALL, cu_seqlens=cu_seqlens, scale=scale, impl=impl)


def select(
    key: Tensor,
    value: Tensor,
    rule: Rule | HasRule,
    *,
    query: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    impl: Impl = "auto",
) -> Selection:
    """Positions and scores of the tokens that each partition has kept when the last token attends.

    The arguments are those of :func:`sparse_attention`, which keeps the same tokens. The queries are needed only if the
    compressor scores by them.

    Raises:
        UserError: the arguments do not fit together, the compressor makes new pairs, or it needs queries that are
            missing.
    """
    rule = rule_of(rule)
    bare = bare_keys(key, value, rule.compressor)
    queries = bare if query is None else query
    _check_tensors(queries, bare, value)
    boundaries = _boundaries(cu_seqlens, bare, queries)
    selection: Selection = implementation(impl, bare).select(key, value, rule, boundaries, query)
    return selection


def implementation(impl: str, query: Tensor) -> ModuleType:
    """The module that runs the operator on tensors like ``query``.

    It has the functions ``forward``, ``forward_and_compact``, ``attend``, ``attend_rows``, ``attend_one``, ``compress``
    and ``select``.

    Raises:
        UserError: there is no implementation of this name, or it cannot run here.
    """
    chosen = _choose(impl, query.device.type, query.dtype, query.shape[-1])
    return eager if chosen == "eager" else _triton()


def _choose(impl: str, device: str, dtype: torch.dtype, dim: int) -> str:
    """The implementation's name; torch.compile takes it as a constant and does not trace the checks."""
    return _decide(impl, device, dtype, dim)


# What torch.compiler.assume_constant_result does, without importing the compiler, which would import triton.
_choose._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.lru_cache
def _decide(impl: str, device: str, dtype: torch.dtype, dim: int) -> str:
    """The implementation's name. Cached, so that the choice of ``auto`` and its reason are logged once."""
    found = choice(impl, device, dtype, dim)
    if impl == "triton" and found.refusal is not None:
        raise found.refusal
    if impl == "auto" and found.refusal is not None and device == "cuda":
        _log.warning("sparse_attention on %s runs impl=eager, which is slow: %s", device, found.refusal)
    elif impl != "eager":
        _log.info("sparse_attention on %s runs impl=%s", device, found.name)
    return found.name


class Choice(NamedTuple):
    """Which implementation runs.

    Attributes:
        name: "eager" or "triton".
        refusal: why "triton" does not run; None if it does, or if "eager" was asked for.
    """

    name: str
    refusal: UserError | None = None


def choice(impl: str, device: str, dtype: torch.dtype, dim: int) -> Choice:
    """Choose the implementation for a device, a dtype and a head size, without logging the choice.

    Args:
        impl: as in :func:`sparse_attention`.
        device: the device type: "cpu", "cuda".
        dtype: of queries, keys and values.
        dim: the head size.

    Raises:
        UserError: there is no implementation of this name.
    """
    if impl not in get_args(Impl):
        raise UserError("impl", impl, f"one of {', '.join(get_args(Impl))}")
    if impl == "eager":
        return Choice("eager")
    if impl == "auto" and device != "cuda":
        return Choice("eager", UserError("device", device, reason="has no Triton kernels; CUDA devices have"))
    if importlib.util.find_spec("triton") is None:
        refusal = UserError("impl", "triton", reason="needs the package triton, which is not installed; use eager")
    else:
        refusal = _triton().unsupported(device, dtype, dim)
    return Choice("triton" if refusal is None else "eager", refusal)


def _triton() -> Any:
    """The Triton implementation. It is imported on demand, because some platforms have no triton wheel."""
    from lrsa_lit.ops.sparse_attention.triton import launch

    return launch


def is_traceable(impl: str, query: Tensor) -> bool:
    """Whether :func:`traced_attention` can run on these queries, that is, whether ``impl`` picks the Triton kernels."""
    return implementation(impl, query) is not eager


def traced_attention(
    query: Tensor, key: Tensor, value: Tensor, rule_tensor: Tensor, *, cu_seqlens: Tensor | None = None, scale: float
) -> Tensor:
    """Compute ``sparse_attention(…, impl="triton")`` as one opaque operator in each direction, for torch.compile.

    A compiled graph specialises on integers but not on the contents of tensors. With the rule in a tensor
    (:func:`tensor_of_rule`), one graph serves all layers and rules; a second one serves layers whose heads have
    different rules (:func:`tensor_of_heads`). ``cu_seqlens`` is on the CPU, and Tq = T.

    Raises:
        UserError: the arguments do not fit together.
    """
    _check_tensors(query, key, value)
    if query.shape[2] != key.shape[2]:
        counts = f"has {query.shape[2]} tokens and key has {key.shape[2]}"
        raise UserError("query", reason=f"{counts}; the numbers must be equal here")
    if cu_seqlens is not None:
        _check_packing(cu_seqlens, key, query)
    from lrsa_lit.ops.sparse_attention.triton import attention_op

    return attention_op.traced_attention(query, key, value, rule_tensor, cu_seqlens, scale)


def _check_tensors(query: Tensor, key: Tensor, value: Tensor) -> None:
    """Raise a UserError if queries, keys and values are not what :func:`sparse_attention` takes."""
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
        allowed = f"of 1 to {key.shape[2]} tokens, the number of keys"
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
    _check_packing(cu_seqlens, key, query)
    return checked_boundaries(cu_seqlens.tolist(), length)


def _check_packing(cu_seqlens: Tensor, key: Tensor, query: Tensor) -> None:
    """Raise a UserError unless ``cu_seqlens`` is an integer (N + 1,) tensor and the rows can be packed."""
    length = key.shape[2]
    if not isinstance(cu_seqlens, Tensor):
        raise UserError("cu_seqlens", type(cu_seqlens).__name__, "an int32 tensor (N + 1,)")
    if key.shape[0] != 1 or query.shape[2] != length:
        given = f"got B = {key.shape[0]}, {query.shape[2]} queries and {length} keys"
        raise UserError("cu_seqlens", reason=f"packed rows need B = 1 and a query for each key; {given}")
    if cu_seqlens.ndim != 1 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise UserError("cu_seqlens", (cu_seqlens.dtype, *_shape(cu_seqlens)), "int32 (N + 1,)")


def _check_selection(selection: Selection, key: Tensor, rule: Rule, boundaries: Sequence[int]) -> None:
    """Check the shape of a given selection: too few indices would silently shorten the compact buffer."""
    needed = (*key.shape[:2], sum(partition_counts(boundaries, rule)), rule.top_k)
    if _shape(selection.indices) != needed:
        raise UserError("selection", _shape(selection.indices), f"indices {needed} for this rule and these keys")


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)
