"""The Triton implementation of the operator, for CUDA devices, and for the CPU under Triton's interpreter.

``forward`` is the operator; ``attend`` and ``compress`` are its parts, for callers that keep their own compact buffer;
``attend_one`` is the kernel for decoding, ``select`` the fused selection. Gradients flow to everything that floats.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import cast

import torch
import triton
from torch import Tensor

from lrsa_lit.errors import UserError
from lrsa_lit.ops.sparse_attention import selection as in_pytorch
from lrsa_lit.ops.sparse_attention.buffer import Pair
from lrsa_lit.ops.sparse_attention.compressors import Selector, SpreadSelector
from lrsa_lit.ops.sparse_attention.rule import Rule
from lrsa_lit.ops.sparse_attention.selection import Selection
from lrsa_lit.ops.sparse_attention.triton import registered_ops
from lrsa_lit.ops.sparse_attention.triton.decode_kernels import attend_one
from lrsa_lit.ops.sparse_attention.triton.gather_kernel import ranks_of
from lrsa_lit.ops.sparse_attention.triton.launch_arguments import Inputs, positive_scale
from lrsa_lit.ops.sparse_attention.triton.work_tables import Geometry, partition_starts

__all__ = ["attend", "attend_one", "compress", "forward", "select", "unsupported"]

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def unsupported(device: str, dtype: torch.dtype, dim: int) -> UserError | None:
    """Why these kernels cannot run on such tensors; None if they can."""
    interpreted = triton.knobs.runtime.interpret
    if device != "cuda" and not interpreted:
        return UserError("device", device, "cuda for impl=triton, or the CPU with TRITON_INTERPRET=1")
    if dtype not in _DTYPES:
        return UserError("dtype", dtype, "bfloat16, float16 or float32 for impl=triton")
    if interpreted and dtype == torch.bfloat16:
        return UserError("dtype", dtype, "float32 or float16 in Triton's interpreter, which computes others wrongly")
    if dim % 8 or not 16 <= dim <= 256:
        return UserError("head size", dim, "a multiple of 8 from 16 to 256 for impl=triton")
    return None


def forward(
    query: Tensor, key: Tensor, value: Tensor, rule: Rule, *,
    boundaries: Sequence[int], scale: float, selection: Selection | None
) -> Tensor:  # fmt: skip
    """The operator; arguments as in ``eager.forward``."""
    geometry = Geometry.of(rule, boundaries, queries_from=key.shape[2] - query.shape[2])
    if isinstance(rule.compressor, Selector):
        with torch.no_grad():
            ranks = _ranks(key, value, rule, boundaries, selection)
            compact = registered_ops.gather(key, value, ranks, geometry)
    else:
        ranks = None
        pieces = [
            in_pytorch.compact_buffer(key[:, :, start:stop], value[:, :, start:stop], rule)
            for start, stop in itertools.pairwise(boundaries)
        ]
        compact = torch.cat([keys for keys, _ in pieces], dim=2), torch.cat([values for _, values in pieces], dim=2)
    query, scale = positive_scale(query, scale)
    return registered_ops.attend(Inputs(query, key, value, *compact), ranks, geometry, scale)


def attend(
    query: Tensor, compact: Pair, raw: Pair, rule: Rule, *, scale: float, query_offset: int = 0, raw_offset: int = 0
) -> Tensor:
    """Attention of one sequence's queries over compact buffer and raw tokens; arguments as in ``eager.attend``."""
    geometry = Geometry.of(rule, (0, query_offset + query.shape[2]), query_offset, raw_offset)
    query, scale = positive_scale(query, scale)
    return registered_ops.attend(Inputs(query, *raw, *compact), None, geometry, scale)


def compress(key: Tensor, value: Tensor, rule: Rule, count: int, first: int) -> Pair:
    """What ``count`` partitions of a sequence become; arguments as in ``eager.compress``."""
    grads = torch.is_grad_enabled() and (key.requires_grad or value.requires_grad)
    if grads or not isinstance(rule.compressor, SpreadSelector):
        return in_pytorch.compress(key, value, rule, count, first)
    # A sequence of its own, without sinks, that is just long enough to have compressed them.
    whole = dataclasses.replace(rule, sink_size=0, chunk_size=rule.lag_size)
    boundaries = 0, (count + 1) * rule.lag_size + 1
    ranks = _select_lag_relative(key, value, whole, boundaries)[0]
    return registered_ops.gather(key, value, ranks, Geometry.of(whole, boundaries))


@torch.no_grad()
def select(key: Tensor, value: Tensor, rule: Rule, boundaries: Sequence[int]) -> Selection:
    """What :func:`forward` keeps; compressors that know other scores select in PyTorch."""
    if not isinstance(rule.compressor, SpreadSelector):
        return in_pytorch.select(key, value, rule, boundaries)
    ranks, scores = _select_lag_relative(key, value, rule, boundaries)
    # Exactly K ranks of a partition are not -1, so the positions of those form rows of K.
    tokens = (ranks >= 0).flatten(0, 2).nonzero()[:, 1].view(*ranks.shape[:3], rule.top_k)
    return Selection(tokens + partition_starts(Geometry.of(rule, boundaries), key.device)[:, None], scores)


def _ranks(key: Tensor, value: Tensor, rule: Rule, boundaries: Sequence[int], selection: Selection | None) -> Tensor:
    """Ranks (B, H, P, L) of the given selection, else of the rule's."""
    if selection is None and isinstance(rule.compressor, SpreadSelector):
        return _select_lag_relative(key, value, rule, boundaries)[0]
    chosen = in_pytorch.select(key, value, rule, boundaries) if selection is None else selection
    return ranks_of(chosen.indices, Geometry.of(rule, boundaries))


def _select_lag_relative(key: Tensor, value: Tensor, rule: Rule, boundaries: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Ranks and scores under a rule whose compressor is a :class:`SpreadSelector`."""
    weights = cast("SpreadSelector", rule.compressor).weights
    return registered_ops.select_lag_relative(key, value, Geometry.of(rule, boundaries), weights)
