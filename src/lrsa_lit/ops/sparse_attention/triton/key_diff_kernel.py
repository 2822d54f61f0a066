"""The scores of KeyDiff in float32: two passes over the keys of a partition; the second one hits the cache."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lrsa_lit.ops.sparse_attention.triton import host_functions as host
from lrsa_lit.ops.sparse_attention.triton.device_functions import load_rows, partition_row
from lrsa_lit.ops.sparse_attention.triton.replay import replayed
from lrsa_lit.ops.sparse_attention.triton.work_tables import Geometry, partition_table, ranks_shape, sequence_table

_TOKENS = 32


def key_diff_scores(key: Tensor, geometry: Geometry) -> Tensor:
    """Scores (B, H, P, L) float32 of keys (B, H, T, D): minus the cosine to the mean unit key of the partition."""
    key = host.with_rows(key)
    batch, heads, count, lag = ranks_shape(key, geometry)
    scores = torch.empty((batch, heads, count, lag), dtype=torch.float32, device=key.device)
    if scores.numel() > 0:
        _key_diff_kernel[(count, batch * heads)](
            key, scores, partition_table(geometry, key.device), sequence_table(geometry, key.device),
            *host.row_strides(key), heads, count, geometry.sink, lag,
            DIM=key.shape[3], BLOCK=_TOKENS, PADDED=host.power_of_two(key.shape[3]),
        )  # fmt: skip
    return scores


@replayed
@triton.jit(do_not_specialize=host.INTEGERS)
def _key_diff_kernel(
    p_key, p_scores, p_partitions, p_sequences, stride_kb, stride_kh, stride_kt, heads, n_partitions, sink, lag,
    DIM: tl.constexpr, BLOCK: tl.constexpr, PADDED: tl.constexpr
):  # fmt: skip
    """One program per partition and head. Norms have the lower bounds of ``normalize`` and ``cosine_similarity``."""
    i_bh = tl.program_id(1).to(tl.int64)
    p_key += (i_bh // heads) * stride_kb + (i_bh % heads) * stride_kh
    i_row = partition_row(tl.program_id(0), p_partitions, p_sequences, sink, lag)
    b_sums = tl.zeros([BLOCK, PADDED], tl.float32)
    for i_block in range(0, lag, BLOCK):
        # [BLOCK, PADDED]
        b_key = load_rows(p_key, i_row + i_block, stride_kt, lag - i_block, DIM, BLOCK, PADDED, True).to(tl.float32)
        b_sums += b_key * (1.0 / tl.maximum(tl.sqrt(tl.sum(b_key * b_key, axis=1)), 1e-12))[:, None]
    b_mean = tl.sum(b_sums, axis=0) / lag
    b_mean *= 1.0 / tl.maximum(tl.sqrt(tl.sum(b_mean * b_mean, axis=0)), 1e-8)

    o_token = tl.arange(0, BLOCK)
    p_scores += (i_bh * n_partitions + tl.program_id(0)) * lag
    for i_block in range(0, lag, BLOCK):
        # [BLOCK, PADDED]
        b_key = load_rows(p_key, i_row + i_block, stride_kt, lag - i_block, DIM, BLOCK, PADDED, True).to(tl.float32)
        # A key is divided by at least 1e-12 and its new norm is at least 1e-8, so by at least 1e-20 in all.
        b_length = tl.maximum(tl.sqrt(tl.sum(b_key * b_key, axis=1)), 1e-20)
        b_score = -tl.sum(b_key * b_mean[None, :], axis=1) / b_length
        tl.store(p_scores + i_block + o_token, b_score, mask=i_block + o_token < lag)
