"""What partitions keep: the rule's numerics, ties, odd inputs, packed rows, and ready selections."""

import numpy as np
import pytest
import torch
from helpers import boundaries, lag_relative_logs, oracle_kept, oracle_mask, random_qkv, refused
from visible import visible_keys

from lrsa_lit.ops.sparse_attention import (
    ChunkWise,
    LagRelative,
    MeanPool,
    Recency,
    Rule,
    Selection,
    ValueRelative,
    select,
    sparse_attention,
)
from lrsa_lit.ops.sparse_attention.scoring import weighted_ranking

RULE = Rule(sink_size=2, lag_size=8, top_k=3)


def assert_oracle_selects(key, value, rule):
    indices = select(key, value, rule).indices
    for row in range(key.shape[0]):
        for head in range(key.shape[1]):
            assert indices[row, head].tolist() == oracle_kept(key[row, head], value[row, head], rule)


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0, 5.0])
@pytest.mark.parametrize("dim", [2, 7, 16])
def test_the_oracle_selects_the_same(dim, weight):
    _, key, value = random_qkv(120, batch=2, heads=3, dim=dim)
    assert_oracle_selects(key, value, RULE.replace(compressor=LagRelative(value_weight=weight)))


def test_positions_ascend_inside_their_partition_and_scores_rank_them():
    _, key, value = random_qkv(75, batch=2)
    selection = select(key, value, RULE)
    assert selection.indices.shape == (2, 2, 8, 3)
    assert selection.scores.shape == (2, 2, 8, 8)
    assert (selection.indices.diff(dim=-1) > 0).all()
    places = selection.indices - (2 + 8 * torch.arange(8)[:, None])
    assert places.min() >= 0
    assert places.max() < 8
    kept = selection.scores.gather(-1, places)
    others = selection.scores.scatter(-1, places, -1.0)
    assert (kept.amin(dim=-1) >= others.amax(dim=-1)).all()
    torch.testing.assert_close(selection.scores.sum(dim=-1), torch.full((2, 2, 8), 2.0).double())


@pytest.mark.parametrize("length", [1, 17, 18])
def test_a_sequence_too_short_to_compress_selects_nothing(length):
    _, key, value = random_qkv(length)
    selection = select(key, value, RULE)
    assert selection.indices.shape == (1, 2, 0, 3)
    assert selection.scores.shape == (1, 2, 0, 8)
    assert visible_keys(key, value, RULE).equal(torch.ones(1, 2, length, length, dtype=torch.bool).tril())


def test_equal_tokens_keep_the_earliest():
    key = torch.ones(1, 1, 43, 4)
    assert select(key, key, RULE).indices.tolist() == [[[[2 + 8 * p + i for i in range(3)] for p in range(4)]]]


def test_ties_inside_a_partition_go_to_the_earlier_token():
    _, key, value = random_qkv(43)
    for tensor in (key, value):
        for p in range(5):  # the tokens 1, 3, 4, 6 of each partition are one token
            tensor[:, :, [2 + 8 * p + place for place in (3, 4, 6)]] = tensor[:, :, 2 + 8 * p + 1, None]
    for top_k in range(9):
        assert_oracle_selects(key, value, RULE.replace(top_k=top_k))
        places = select(key, value, RULE.replace(top_k=top_k)).indices - (2 + 8 * torch.arange(4)[:, None])
        for kept in places.flatten(0, 2).tolist():
            tied = [place for place in kept if place in (1, 3, 4, 6)]
            assert tied == [1, 3, 4, 6][: len(tied)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_equal_tokens_have_equal_order_wherever_they_are(dtype):
    generator = torch.Generator().manual_seed(0)
    for length in [*range(2, 40)] * 20:
        spreads = 3 * torch.rand(2, length, dtype=dtype, generator=generator)
        # Vectorised loops on the CPU treat the last numbers of a tensor apart.
        spreads[:, -1] = spreads[:, 0]
        order = weighted_ranking([*spreads], [1.0, 0.7]).order
        assert order[-1] == order[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("constant", ["zero", "one", "huge", "jitter"])
def test_channels_that_are_constant_over_the_reference(constant, dtype):
    _, key, value = random_qkv(90, dim=5)
    level = {"zero": 0.0, "one": 1.0, "huge": -3e4, "jitter": 1000.0}[constant]
    key[..., 1] = level
    value[..., 3] = level
    if constant == "jitter":
        key[..., 1] += 2e-4 * torch.rand(90)
    key, value = key.to(dtype), value.to(dtype)
    selection = select(key, value, RULE)
    assert selection.scores.isfinite().all()
    assert_oracle_selects(key, value, RULE)


def test_a_constant_reference_beneath_varying_tokens_stays_finite():
    _, key, value = random_qkv(34, dtype=torch.float32)
    key[:, :, 10:18] = 3.0  # partition 1, the reference of partition 0
    selection = select(key, value, RULE)
    assert selection.scores.isfinite().all()
    assert_oracle_selects(key, value, RULE)


@pytest.mark.parametrize("magnitude", [1e-4, 1e4])
def test_large_and_small_keys(magnitude):
    _, key, value = random_qkv(90)
    assert_oracle_selects(key * magnitude, value, RULE)
    assert_oracle_selects(key * magnitude + 10 * magnitude, value / magnitude, RULE)


def dominated(dtype, factor=1000.0, **sizes):
    """One token of every other partition of RULE dwarfs all others, whose scores round to 0."""
    _, key, value = random_qkv(90, **sizes)
    key[:, :, 5::16] *= factor
    value[:, :, 7::16] *= factor
    return key.to(dtype), value.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("weight", [0.0, 1e-6, 0.5, 3.0, 1e6, 1e30])
def test_the_tokens_beside_one_that_dominates_are_ranked_too(weight, dtype):
    key, value = dominated(dtype, heads=3)
    for top_k in range(1, 8):
        assert_oracle_selects(key, value, RULE.replace(compressor=LagRelative(value_weight=weight), top_k=top_k))
    scores = select(key.float(), value.float(), RULE.replace(compressor=LagRelative(value_weight=0.0))).scores
    assert (scores == 0).float().mean() > 0.3, "scores that float32 rounds to 0 are what this is about"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_one_score_alone_ranks_beside_a_token_that_dominates(dtype):
    key, value = dominated(dtype)
    by_values = select(key, value, RULE.replace(compressor=ValueRelative())).indices
    assert by_values.equal(select(value, key, RULE.replace(compressor=LagRelative(value_weight=0.0))).indices)
    assert_oracle_selects(value, value, RULE)
    assert by_values.equal(select(value, value, RULE).indices)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_runs_beside_a_token_that_dominates_are_ranked_by_their_means(dtype):
    key, value = dominated(dtype)
    rule = RULE.replace(top_k=4, compressor=ChunkWise(2))
    for head in range(2):
        for kept, start in zip(select(key, value, rule).indices[0, head].tolist(), range(2, 90, 8), strict=False):
            parts = (x[0, head, at : at + 8] for at in (start, start + 8) for x in (key, value))
            logs = lag_relative_logs(*parts, rule).reshape(4, 2)
            best = np.sort(np.argsort(-np.logaddexp(logs[:, 0], logs[:, 1]))[:2])
            assert kept == [start + 2 * run + place for run in best.tolist() for place in (0, 1)]


def test_a_partition_far_from_its_reference_keeps_its_order():
    _, key, value = random_qkv(43, dtype=torch.float32)
    key[:, :, 2:10] *= 1e25
    selection = select(key, value, RULE)
    assert selection.scores.isfinite().all()
    assert_oracle_selects(key, value, RULE)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")], ids=str)
@pytest.mark.parametrize("where", ["a-token", "a-channel", "everything"])
def test_inputs_that_are_not_finite_stay_in_range(bad, where):
    query, key, value = random_qkv(60, dtype=torch.float32)
    block = {"a-token": (..., 20, slice(None)), "a-channel": (..., slice(None), 0), "everything": ...}[where]
    key[block] = bad
    selection = select(key, value, RULE)
    places = selection.indices - (2 + 8 * torch.arange(6)[:, None])
    assert places.min() >= 0
    assert places.max() < 8
    assert (places.diff(dim=-1) > 0).all(), "each token at most once"
    output = sparse_attention(query, key, value, RULE)
    assert output.shape == query.shape
    if where == "a-token":
        assert output[:, :, :18].isfinite().all(), "queries of the spans before it"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_scored_in_single(dtype):
    rule = Rule(4, 64, 16)
    _, key, value = random_qkv(4 + 64 * 20, heads=4, dim=32, dtype=dtype)
    selection = select(key, value, rule)
    assert selection.scores.dtype == torch.float32
    upcast = select(key.float(), value.float(), rule)
    assert selection.indices.equal(upcast.indices)
    assert selection.scores.equal(upcast.scores)


def test_double_precision_is_scored_in_double():
    _, key, value = random_qkv(60)
    assert select(key, value, RULE).scores.dtype == torch.float64


def test_a_selection_is_a_constant_for_the_gradient():
    _, key, value = random_qkv(60, grad=True)
    assert not select(key, value, RULE).scores.requires_grad


def test_kept_tokens_do_not_depend_on_the_future_beyond_the_reference():
    _, key, value = random_qkv(75)
    whole = select(key, value, RULE).indices
    for count in range(1, 8):
        part = 2 + 8 * (count + 1)
        assert select(key[:, :, : part + 1], value[:, :, : part + 1], RULE).indices.equal(whole[:, :, :count])


def test_packed_rows_select_for_each_sequence_from_its_own_start():
    lengths = [1, 40, 0, 18, 61]
    _, key, value = random_qkv(sum(lengths))
    packed = select(key, value, RULE, cu_seqlens=boundaries(lengths))
    parts, start = [], 0
    for length in lengths:
        if length:
            block = slice(start, start + length)
            parts.append(select(key[:, :, block], value[:, :, block], RULE))
            parts[-1] = Selection(parts[-1].indices + start, parts[-1].scores)
        start += length
    assert packed.indices.equal(torch.cat([part.indices for part in parts], dim=2))
    assert packed.scores.equal(torch.cat([part.scores for part in parts], dim=2))


@pytest.mark.parametrize("chunk", [None, 1, 5, 12, 16])
@pytest.mark.parametrize("top_k", [0, 3, 8])
def test_the_oracle_sees_the_same_keys(chunk, top_k):
    rule = RULE.replace(chunk_size=chunk, top_k=top_k)
    _, key, value = random_qkv(90, batch=2)
    assert visible_keys(key, value, rule).equal(oracle_mask(key, value, rule))


def test_packed_visibility_is_block_diagonal():
    lengths = [30, 0, 1, 44]
    _, key, value = random_qkv(75)
    mask = visible_keys(key, value, RULE, cu_seqlens=boundaries(lengths))
    for start, stop in ((0, 30), (30, 31), (31, 75)):
        block = slice(start, stop)
        assert mask[:, :, block, block].equal(oracle_mask(key[:, :, block], value[:, :, block], RULE))
        mask[:, :, block, block] = False
    assert not mask.any()


def test_a_synthesizer_selects_nothing_and_says_so():
    _, key, value = random_qkv(40)
    with refused("compressor", "MeanPool", "a Selector"):
        select(key, value, RULE.replace(compressor=MeanPool()))


def test_scores_come_from_the_configured_compressor():
    _, key, value = random_qkv(40)
    assert select(key, value, RULE.replace(compressor=Recency())).indices[0, 0].tolist() == [
        [2 + 8 * p + place for place in (5, 6, 7)] for p in range(3)
    ]
