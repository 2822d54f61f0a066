"""The operator with its rule in a tensor: one graph of torch.compile then serves all rules, each layer with its own.

A graph takes integers as constants or as sizes to reason about; what a tensor holds it takes as it comes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lrsa_lit.errors import UserError
from lrsa_lit.ops.sparse_attention import eager
from lrsa_lit.ops.sparse_attention.api import check_packing, check_tensors, implementation
from lrsa_lit.ops.sparse_attention.compressors import SpreadSelector
from lrsa_lit.ops.sparse_attention.rule import Rule


def tensor_of_rule(rule: Rule) -> Tensor | None:
    """S, L, K, C and the weights of the key and the value score as float64 (6,) on the CPU; None without weights."""
    if not isinstance(rule.compressor, SpreadSelector):
        return None
    values = *rule.numbers, *rule.compressor.weights
    # An evaluation may switch the rule under inference mode, whose tensors no graph that trains takes.
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=torch.float64, device="cpu")


def is_traceable(impl: str, query: Tensor) -> bool:
    """Whether :func:`traced_attention` runs on such queries: where ``impl`` means the Triton kernels."""
    return implementation(impl, query) is not eager


def traced_attention(
    query: Tensor, key: Tensor, value: Tensor, rule_tensor: Tensor, *, cu_seqlens: Tensor | None = None, scale: float
) -> Tensor:
    """What ``sparse_attention(…, impl="triton")`` computes, as one opaque operator forward and one backward.

    The rule is that of :func:`tensor_of_rule`, and ``cu_seqlens`` lie on the CPU. Queries are as many as keys.

    Raises:
        UserError: arguments that do not fit together.
    """
    check_tensors(query, key, value)
    if query.shape[2] != key.shape[2]:
        raise UserError("query", reason=f"{query.shape[2]} tokens over {key.shape[2]} keys; here they are as many")
    if cu_seqlens is not None:
        check_packing(cu_seqlens, key, query)
    from lrsa_lit.ops.sparse_attention.triton import registered_ops

    return registered_ops.traced_attention(query, key, value, rule_tensor, cu_seqlens, scale)
