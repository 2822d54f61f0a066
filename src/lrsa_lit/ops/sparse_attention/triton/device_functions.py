"""Functions shared by the kernels: the rule's arithmetic on the device, tile bounds, and row loads.

Every query sees one contiguous range of each *source*, so the same few numbers serve all kernels. There are two
sources: the compact buffer (``COMPACT``), visible from 0 to S + K P(t), and the raw tokens, visible from S + P(t) L to
t. Both ends of both ranges never decrease as t grows. So the queries of a tile together see from(first query) …
to(last query), and every one of them sees from(last query) … to(first query), where no mask is needed.

Prefixes of kernel locals: i index, n count, p pointer, o offsets, m mask, b block of values, d TMA descriptor.
Symbols: S sink, L lag, K keep, C chunk, t a query's position in its sequence, P(t) compressed partitions at t.
"""

from __future__ import annotations

from types import FunctionType
from typing import Any

import triton
import triton.language as tl

from lrsa_lit.ops.sparse_attention import rule_arithmetic

# Columns of the sequence table (work_tables.sequence_table), in order, and their number.
QUERY_ROW, QUERY_FROM, QUERY_TO, KEY_ROW, KEY_FROM, KEY_TO = map(tl.constexpr, range(6))
COMPACT_ROW, PARTITION_ROW, PARTITIONS, COLUMNS = map(tl.constexpr, range(6, 10))

LOWEST = tl.constexpr(-3.3e38)
"""The running maximum before the first key: finite, so that rows which see nothing of a block need no special case."""


def _compiled(function: Any) -> Any:
    """The function compiled for kernels, with this module's globals, because Triton's interpreter patches those."""
    return triton.jit(FunctionType(function.__code__, globals(), function.__name__))


partitions_at = _compiled(rule_arithmetic.partitions_at)
first_position = _compiled(rule_arithmetic.first_position)
sinks_and = _compiled(rule_arithmetic.sinks_and)


@triton.jit
def visible_range(t, sink, lag, keep, chunk, COMPACT: tl.constexpr):
    """The columns [from, to) of the source that queries at t see."""
    count = partitions_at(t, sink, lag, chunk)
    if COMPACT:
        return count * 0, sinks_and(count, sink, keep)
    return sinks_and(count, sink, lag), t + 1


@triton.jit
def first_seen_by(column, sink, lag, keep, chunk, COMPACT: tl.constexpr):
    """The first query that sees the column."""
    if COMPACT:
        kept = tl.maximum(column - sink, 0) // tl.maximum(keep, 1)
        return first_position(kept + 1, sink, lag, chunk)
    return column


@triton.jit
def lost_to(column, sink, lag, chunk, COMPACT: tl.constexpr):
    """The first query that no longer sees the column; compact columns stay visible forever."""
    if COMPACT:
        return column * 0 + 2147483647
    return first_position(tl.maximum(column - sink, 0) // lag + 1, sink, lag, chunk)


@triton.jit
def split_blocks(start, full_from, full_to, stop, BLOCK: tl.constexpr):
    """Split [start, stop) into blocks: full ones [begin, end) within [full_from, full_to), masked ones on both sides.

    Returns begin, end, and BLOCK times the number of masked blocks.
    """
    stop = tl.maximum(start, stop)
    begin = tl.minimum(start + (tl.maximum(full_from - start, 0) + BLOCK - 1) // BLOCK * BLOCK, stop)
    end = begin + tl.maximum(tl.minimum(full_to, stop) - begin, 0) // BLOCK * BLOCK
    behind = (stop - end + BLOCK - 1) // BLOCK * BLOCK
    return begin, end, (begin - start + BLOCK - 1) // BLOCK * BLOCK + behind


@triton.jit
def masked_block(step, start, begin, end):
    """The start of the masked block at ``step``: first those before the full blocks, then those after them."""
    return tl.where(step < begin - start, start + step, end + step - (begin - start))


@triton.jit
def query_tile(p_tiles, p_sequences, n_batch_heads, heads, BLOCK_M: tl.constexpr):
    """The tile of queries and the head of a program; heads of the same tile run together and share keys in L2.

    Returns batch, head, and their combined index; row of the sequence table; row of position 0, first position, all
    positions [BLOCK_M], which of them have a query, and the range of those.
    """
    i_tile, i_bh = tl.program_id(0) // n_batch_heads, tl.program_id(0) % n_batch_heads
    i_b, i_h = (i_bh // heads).to(tl.int64), (i_bh % heads).to(tl.int64)
    p_sequence = p_sequences + tl.load(p_tiles + i_tile * 2) * COLUMNS
    i_first = tl.load(p_tiles + i_tile * 2 + 1)
    i_row = tl.load(p_sequence + QUERY_ROW)
    i_low = tl.maximum(i_first, tl.load(p_sequence + QUERY_FROM))
    i_high = tl.minimum(i_first + BLOCK_M, tl.load(p_sequence + QUERY_TO))
    # Rows before the first query repeat it; they are never stored.
    o_t = tl.maximum(i_first + tl.arange(0, BLOCK_M), i_low)
    m_t = (i_first + tl.arange(0, BLOCK_M) >= i_low) & (o_t < i_high)
    return i_b, i_h, i_bh.to(tl.int64), p_sequence, i_row, i_first, o_t, m_t, i_low, i_high


@triton.jit
def partition_row(i_partition, p_partitions, p_sequences, sink, lag):
    """The row of a partition's first token."""
    i_sequence, i_ordinal = tl.load(p_partitions + i_partition * 2), tl.load(p_partitions + i_partition * 2 + 1)
    return tl.load(p_sequences + i_sequence * COLUMNS + KEY_ROW) + sink + i_ordinal * lag


@triton.jit
def load_tile(p_base, o_row, stride, m_row, DIM: tl.constexpr, PADDED: tl.constexpr):
    """Load rows ``o_row`` of a matrix with DIM columns: [rows, PADDED], zero where not ``m_row`` and in padding."""
    o_dim = tl.arange(0, PADDED)
    m_tile = m_row[:, None] & (o_dim < DIM)[None, :]
    return tl.load(p_base + o_row[:, None] * stride + o_dim[None, :], mask=m_tile, other=0.0)


@triton.jit
def load_rows(
    p_base, row, stride, count, DIM: tl.constexpr, BLOCK: tl.constexpr, PADDED: tl.constexpr, MASKED: tl.constexpr
):
    """Load rows from ``row`` on: [BLOCK, PADDED], zero from column DIM on and, if MASKED, from row ``count`` on.

    Row offsets are 64-bit: a million tokens of 32 heads overflow 32 bits.
    """
    o_row = tl.arange(0, BLOCK)
    o_dim = tl.arange(0, PADDED)
    # [BLOCK, PADDED]
    p_rows = p_base + tl.cast(row, tl.int64) * stride + o_row[:, None] * stride + o_dim[None, :]
    if MASKED and PADDED > DIM:
        b_rows = tl.load(p_rows, mask=(o_row < count)[:, None] & (o_dim < DIM)[None, :], other=0.0)
    elif MASKED:
        b_rows = tl.load(p_rows, mask=(o_row < count)[:, None], other=0.0)
    elif PADDED > DIM:
        b_rows = tl.load(p_rows, mask=(o_dim < DIM)[None, :], other=0.0)
    else:
        b_rows = tl.load(p_rows)
    return b_rows


@triton.jit
def load_block(d_base, i_b, i_head, p_base, row, stride, DIM: tl.constexpr, BLOCK: tl.constexpr, PADDED: tl.constexpr):
    """Load whole rows of one head from ``row`` on, by its descriptor, or from ``p_base`` if it has none."""
    if d_base is None:
        b_rows = load_rows(p_base, row, stride, BLOCK, DIM, BLOCK, PADDED, False)
    else:
        b_rows = d_base.load([i_b.to(tl.int32), i_head.to(tl.int32), row, 0]).reshape(BLOCK, PADDED)
    return b_rows


@triton.jit
def store_rows(p_base, row, stride, m_row, b_rows, DIM: tl.constexpr, BLOCK: tl.constexpr, PADDED: tl.constexpr):
    """Store [BLOCK, PADDED] from ``row`` on in a matrix with DIM columns, where ``m_row``."""
    o_row = tl.arange(0, BLOCK)
    o_dim = tl.arange(0, PADDED)
    p_rows = p_base + tl.cast(row, tl.int64) * stride + o_row[:, None] * stride + o_dim[None, :]
    tl.store(p_rows, b_rows.to(p_base.dtype.element_ty), mask=m_row[:, None] & (o_dim < DIM)[None, :])


@triton.jit
def walk_sources(
    state, tile, seen, place, compact, raw, rule, scale_log2,
    STEP: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr, PRECISION: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """Fold STEP over all blocks of keys that a tile of queries sees, first in the compact buffer, then in raw tokens.

    ``state`` is what STEP(state, tile, key, value, mask, scale_log2, PRECISION) returns, and ``tile`` its data of the
    queries. ``seen`` has the positions, and the range of those with a query. ``place`` is batch, key-value head, and
    row of the sequence table. ``compact`` points to keys and values of the head, with row strides and descriptors;
    ``raw`` points to those of all heads, with strides of B, H and T.
    """
    i_row = tl.load(place[2] + COMPACT_ROW)
    state = _walk(
        state, tile, seen, place, i_row, compact, rule, scale_log2, STEP, True, DIM, PADDED, PRECISION, BLOCK_N
    )
    i_row = tl.load(place[2] + KEY_ROW)
    p_key, p_value, key_strides, value_strides, d_key, d_value = raw
    p_key += place[0] * key_strides[0] + place[1] * key_strides[1]
    p_value += place[0] * value_strides[0] + place[1] * value_strides[1]
    raw = p_key, p_value, key_strides[2], value_strides[2], d_key, d_value
    return _walk(state, tile, seen, place, i_row, raw, rule, scale_log2, STEP, False, DIM, PADDED, PRECISION, BLOCK_N)


@triton.jit
def _walk(
    state, tile, seen, place, i_row, source, rule, scale_log2, STEP: tl.constexpr, COMPACT: tl.constexpr,
    DIM: tl.constexpr, PADDED: tl.constexpr, PRECISION: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """:func:`walk_sources` for one source: full blocks, then masked ones."""
    o_t, i_low, i_high = seen
    i_b, i_head, _ = place
    p_key, p_value, stride_k, stride_v, d_key, d_value = source
    sink, lag, keep, chunk = rule
    i_start, i_full_to = visible_range(i_low, sink, lag, keep, chunk, COMPACT)
    i_full_from, i_stop = visible_range(i_high - 1, sink, lag, keep, chunk, COMPACT)
    i_begin, i_end, n_masked = split_blocks(i_start, i_full_from, i_full_to, i_stop, BLOCK_N)
    o_from, o_to = visible_range(o_t, sink, lag, keep, chunk, COMPACT)
    o_n = tl.arange(0, BLOCK_N)
    for i_n in range(i_begin, i_end, BLOCK_N):
        # [BLOCK_N, PADDED]
        b_key = load_block(d_key, i_b, i_head, p_key, i_row + i_n, stride_k, DIM, BLOCK_N, PADDED)
        b_value = load_block(d_value, i_b, i_head, p_value, i_row + i_n, stride_v, DIM, BLOCK_N, PADDED)
        state = STEP(state, tile, b_key, b_value, None, scale_log2, PRECISION)
    for i_step in range(0, n_masked, BLOCK_N):
        i_n = masked_block(i_step, i_start, i_begin, i_end)
        # [BLOCK_N, PADDED]
        b_key = load_rows(p_key, i_row + i_n, stride_k, i_stop - i_n, DIM, BLOCK_N, PADDED, True)
        b_value = load_rows(p_value, i_row + i_n, stride_v, i_stop - i_n, DIM, BLOCK_N, PADDED, True)
        m_visible = (i_n + o_n[None, :] >= o_from[:, None]) & (i_n + o_n[None, :] < o_to[:, None])
        state = STEP(state, tile, b_key, b_value, m_visible, scale_log2, PRECISION)
    return state
