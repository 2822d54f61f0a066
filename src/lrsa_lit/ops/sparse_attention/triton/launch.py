"""The Triton implementation of the operator, for CUDA devices, and for the CPU in Triton's interpreter.

``forward`` is the operator. ``attend``, ``attend_rows`` and ``compress`` are its parts, for callers that keep their own
compact buffers.
``attend_one`` is the kernel for decoding, and ``select`` the fused selection. All floating-point inputs get gradients,
except those of ``attend_one`` and ``select``.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from lrsa_lit.errors import UserError
from lrsa_lit.ops.sparse_attention import selection as in_pytorch
from lrsa_lit.ops.sparse_attention.buffer import Pair, Seen, joined
from lrsa_lit.ops.sparse_attention.compressors import Selector, gather_kept
from lrsa_lit.ops.sparse_attention.kernel_code import kernel_code
from lrsa_lit.ops.sparse_attention.rule import Rule, tensor_of_rule
from lrsa_lit.ops.sparse_attention.selection import Selection
from lrsa_lit.ops.sparse_attention.synthesizers import FreqPartition
from lrsa_lit.ops.sparse_attention.triton.attention_op import Attend, traced_attention
from lrsa_lit.ops.sparse_attention.triton.decode_kernels import attend_one
from lrsa_lit.ops.sparse_attention.triton.fused_selection import fused_ranks
from lrsa_lit.ops.sparse_attention.triton.gather_kernel import gather_compact, ranks_of
from lrsa_lit.ops.sparse_attention.triton.host_functions import Inputs, positive_scale
from lrsa_lit.ops.sparse_attention.triton.resample_kernel import compress_frequencies
from lrsa_lit.ops.sparse_attention.triton.tape import taped
from lrsa_lit.ops.sparse_attention.triton.work_tables import Geometry, compact_rows, partition_starts, partitions

__all__ = [
    "attend", "attend_one", "attend_rows", "compress", "forward", "forward_and_compact", "select", "unsupported",
]  # fmt: skip

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def unsupported(device: str, dtype: torch.dtype, dim: int) -> UserError | None:
    """Why these kernels cannot run on tensors with this device, dtype and head size; None if they can."""
    interpreted = triton.knobs.runtime.interpret
    if device != "cuda" and not interpreted:
        return UserError("device", device, "cuda for impl=triton, or the CPU with TRITON_INTERPRET=1")
    if dtype not in _DTYPES:
        return UserError("dtype", dtype, "bfloat16, float16 or float32 for impl=triton")
    if interpreted and dtype == torch.bfloat16:
        return UserError("dtype", dtype, "float32 or float16 in Triton's interpreter, which is wrong in bfloat16")
    if dim % 8 or not 16 <= dim <= 256:
        return UserError("head size", dim, "a multiple of 8 from 16 to 256 for impl=triton")
    return None


def forward(
    query: Tensor, key: Tensor, value: Tensor, rule: Rule, *,
    boundaries: Sequence[int], scale: float, selection: Selection | None
) -> Tensor:  # fmt: skip
    """The operator; the arguments are those of ``eager.forward``."""
    if not torch.compiler.is_compiling():
        return _forward(query, key, value, rule, boundaries, scale, selection)[0]
    rule_tensor = tensor_of_rule(rule)
    if selection is None and rule_tensor is not None and query.shape[2] == key.shape[2]:
        cu_seqlens = None if len(boundaries) == 2 else torch.tensor(boundaries, dtype=torch.int32, device="cpu")
        return traced_attention(query, key, value, rule_tensor, cu_seqlens, scale)
    output: Tensor = _untraced_forward(query, key, value, rule, boundaries, scale, selection)[0]
    return output


def forward_and_compact(
    query: Tensor, key: Tensor, value: Tensor, rule: Rule, *,
    boundaries: Sequence[int], scale: float, selection: Selection | None = None
) -> tuple[Tensor, Pair]:  # fmt: skip
    """The operator, and the compact buffer that it attended to; as ``eager.forward_and_compact``."""
    output, compact = _untraced_forward(query, key, value, rule, boundaries, scale, selection)
    return output, compact


def _forward(
    query: Tensor, key: Tensor, value: Tensor, rule: Rule, boundaries: Sequence[int], scale: float,
    selection: Selection | None
) -> tuple[Tensor, Pair]:  # fmt: skip
    geometry = Geometry.of(rule, boundaries, queries_from=key.shape[2] - query.shape[2])
    if isinstance(rule.compressor, Selector) and (selection is not None or not _trains_choice(rule, query, key, value)):
        with torch.no_grad():
            code = kernel_code(rule.compressor.plain, rule.top_k)
            if selection is None and code is not None:
                _check_windows(query, key, rule, geometry)
                ranks, compact_key, compact_value = _select_and_gather((query, key, value), code, geometry)
                compact = compact_key, compact_value
            else:
                if selection is None:
                    selection = in_pytorch.select(key, value, rule, boundaries, query)
                ranks = ranks_of(selection.indices, geometry)
                compact = gather_compact(key, value, ranks, geometry)
    elif rule.compressor.ignores_place and len(boundaries) > 2 and not _want_gradient(key, value):
        by = compress_frequencies if type(rule.compressor) is FreqPartition else None
        ranks, compact = None, in_pytorch.compact_buffer_of_packed(key, value, rule, boundaries, by)
    else:
        ranks = None
        rows = itertools.starmap(slice, itertools.pairwise(boundaries))
        compact = joined(
            *(
                in_pytorch.compact_buffer(key[:, :, part], value[:, :, part], rule, query=queries, compress_by=compress)
                for part, queries in zip(rows, in_pytorch.queries_of(query, key, boundaries), strict=True)
            )
        )
    return _attend(Inputs(query, key, value, *compact), ranks, geometry, scale), (compact[0], compact[1])


@taped
def _select_and_gather(
    tensors: Sequence[Tensor], code: tuple[float, ...], geometry: Geometry
) -> tuple[Tensor, Tensor, Tensor]:
    """Ranks, and the compact buffer, for queries, keys and values."""
    query, key, value = tensors
    ranks, _ = fused_ranks(code, query, key, value, geometry)
    return ranks, *gather_compact(key, value, ranks, geometry)


def _trains_choice(rule: Rule, *tensors: Tensor) -> bool:
    """Whether compact pairs have an additional gradient, besides the one of the tokens that they copy."""
    return rule.compressor.plain is not rule.compressor and _want_gradient(*tensors)


def _want_gradient(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


_untraced_forward = torch.compiler.disable(_forward)


def _attend(inputs: Inputs, ranks: Tensor | None, geometry: Geometry, scale: float) -> Tensor:
    query, scale = positive_scale(inputs.query, scale)
    output: Tensor = Attend.apply(query, *inputs[1:], ranks, geometry, scale)
    return output


def attend(
    query: Tensor, compact: Pair, raw: Pair, rule: Rule, *, scale: float, query_offset: int = 0, raw_offset: int = 0
) -> Tensor:
    """Attention of one sequence's queries over compact buffer and raw tokens; arguments of ``eager.attend``."""
    geometry = Geometry.of(rule, (0, query_offset + query.shape[2]), query_offset, raw_offset)
    return _attend(Inputs(query, *raw, *compact), None, geometry, scale)


def attend_rows(query: Tensor, rows: Sequence[Seen], rule: Rule, *, scale: float) -> Tensor:
    """Attention of the new tokens of several rows in one launch; arguments of ``eager.attend_rows``."""
    boundaries = (0, *itertools.accumulate(row.tokens for row in rows))
    firsts = tuple(row.new_from for row in rows), tuple(row.raw_from for row in rows)
    geometry = Geometry.of(rule, boundaries, *firsts)
    compact = joined(
        *(
            (row.compact[0][:, :, :size], row.compact[1][:, :, :size])
            for row, size in zip(rows, compact_rows(geometry), strict=True)
        )
    )
    return _attend(Inputs(query, *joined(*(row.raw for row in rows)), *compact), None, geometry, scale)


def compress(
    key: Tensor, value: Tensor, rule: Rule, count: int, first: int = 0, next_query: Tensor | None = None
) -> Pair:
    """Compress ``count`` partitions of a sequence; the arguments are those of ``eager.compress``."""
    if type(rule.compressor) is FreqPartition:
        compact = compress_frequencies(in_pytorch.partitions_of(key, value, rule, count, first))
        return compact[0].flatten(2, 3), compact[1].flatten(2, 3)
    code = kernel_code(rule.compressor.plain, rule.top_k)
    gradient = _want_gradient(key, value, next_query)
    if code is None or (gradient and rule.compressor.plain is not rule.compressor):
        return in_pytorch.compress(key, value, rule, count, first, next_query)
    if next_query is not None:
        # More queries may be given, for the gradient's selector.
        next_query = next_query[..., next_query.shape[-2] - rule.compressor.plain.window :, :]
    # Treat them as a separate sequence without sinks, just long enough for these partitions to be compressed.
    geometry = Geometry(0, rule.lag_size, rule.top_k, rule.lag_size, (0, (count + 1) * rule.lag_size + 1))
    with torch.no_grad():
        ranks, _ = fused_ranks(code, next_query, key, value, geometry)
        if not gradient:
            return gather_compact(key, value, ranks, geometry)
        tokens = _tokens_of(ranks, rule.top_k)
    kept = [
        gather_kept(part[:, :, : count * rule.lag_size].unflatten(2, (count, rule.lag_size)), tokens).flatten(2, 3)
        for part in (key, value)
    ]
    return kept[0], kept[1]


def _tokens_of(ranks: Tensor, keep: int) -> Tensor:
    """Places (B, H, P, K), within their partitions, of the tokens whose ranks (B, H, P, L) are 0 to K - 1."""
    places = torch.arange(ranks.shape[3], device=ranks.device).expand(ranks.shape)
    tokens = places.new_zeros(*ranks.shape[:3], keep + 1)
    # What is dropped goes to one more place.
    return tokens.scatter_(-1, ranks.masked_fill(ranks < 0, keep).long(), places)[..., :keep]


@torch.compiler.disable
@torch.no_grad()
def select(key: Tensor, value: Tensor, rule: Rule, boundaries: Sequence[int], query: Tensor | None = None) -> Selection:
    """The tokens that :func:`forward` keeps; compressors without fused scores select in PyTorch."""
    code = kernel_code(rule.compressor.plain, rule.top_k)
    if code is None:
        return in_pytorch.select(key, value, rule, boundaries, query)
    geometry = Geometry.of(rule, boundaries, queries_from=0 if query is None else key.shape[2] - query.shape[2])
    _check_windows(query, key, rule, geometry)
    ranks, scores = fused_ranks(code, query, key, value, geometry)
    # Exactly K ranks of each partition are not -1, so their positions form rows of K.
    tokens = (ranks >= 0).flatten(0, 2).nonzero()[:, 1].view(*ranks.shape[:3], rule.top_k)
    return Selection(tokens + partition_starts(geometry, key.device)[:, None], scores)


def _check_windows(query: Tensor | None, key: Tensor, rule: Rule, geometry: Geometry) -> None:
    """Raise a UserError if the compressor needs queries that are missing."""
    if rule.compressor.window and any(partitions(geometry)):
        in_pytorch.windows_of(query, key, rule, 1)
