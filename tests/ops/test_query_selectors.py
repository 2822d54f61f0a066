"""Selection by the last queries of the reference: against recorded vectors, a loop in float64, and where queries lack.

``chunkkv.json`` has the scores of SnapKV and ChunkKV in a partition, computed in NumPy from the definitions.
"""

import json

import numpy as np
import pytest
import torch
from helpers import VECTORS, boundaries, random_qkv, refused

from lrsa_lit.ops.sparse_attention import (
    Compressor,
    KeyValueStream,
    LagRelative,
    LagRelativeTail,
    Partitions,
    QueryAttention,
    QueryRuns,
    Rotary,
    Rule,
    select,
    sparse_attention,
)

RULE = Rule(sink_size=2, lag_size=8, top_k=3, compressor=QueryAttention(window=3))


@pytest.fixture(scope="module")
def recorded():
    """The recorded partition (with its query windows) and what the definitions make of it."""
    vectors = json.loads((VECTORS / "systems/chunkkv.json").read_text())
    found = vectors["partition_adaptation"]
    lag, kept, start, window = (found["params"][name] for name in ("L", "K", "start", "window"))
    query, key = (torch.tensor(vectors["inputs"][name], dtype=torch.float64) for name in "qk")
    rotary = Rotary.plain(key.shape[-1])
    query, key = (rotary.rotate(x, torch.arange(x.shape[-2]))[None] for x in (query, key))
    parts = key[:, :, start : start + 2 * lag].unflatten(2, (2, lag))
    windows = query[:, :, :, start + 2 * lag - window : start + 2 * lag].unsqueeze(3)
    given = parts[:, :, :1], parts[:, :, :1], parts[:, :, 1:], parts[:, :, 1:]
    return Partitions(*given, kept, next_query=windows), found


def test_scores_and_kept_tokens_are_those_of_the_definition(recorded):
    parts, found = recorded
    kept, scores = QueryAttention(window=3).keep(parts)
    torch.testing.assert_close(scores[0, :, 0], torch.tensor(found["token_scores"]).double(), rtol=0, atol=1e-6)
    assert kept[0, :, 0].tolist() == found["kept_tokens"]


def test_runs_are_those_of_the_definition(recorded):
    parts, found = recorded
    kept, scores = QueryRuns(window=3, size=2).keep(parts)
    torch.testing.assert_close(scores[0, :, 0, ::2], torch.tensor(found["run_scores"]).double(), rtol=0, atol=1e-6)
    assert kept[0, :, 0].tolist() == found["kept_runs"]
    shared, _ = QueryRuns(window=3, size=2, shared_heads=True).keep(parts)
    assert shared[0, :, 0].tolist() == [found["kept_runs_shared_heads"]] * 2


def slow_scores(query, key, p, kernel):
    """Scores (L,) of one key-value head of RULE: query (G, T, D), key (T, D)."""
    start = 2 + 8 * p
    total = np.zeros(8)
    for rows in query:
        for row in rows[start + 16 - 3 : start + 16]:
            logits = np.array([row @ key[start + place] for place in range(8)]) / np.sqrt(len(row))
            weights = np.exp(logits - logits.max())
            total += weights / weights.sum() / (3 * len(query))
    side = kernel // 2
    return np.array([sum(total[max(place - side, 0) : place + side + 1]) / kernel for place in range(8)])


@pytest.mark.parametrize("kernel", [1, 3, 5])
@pytest.mark.parametrize("shared", [False, True], ids=["apart", "shared"])
def test_it_keeps_what_a_loop_over_queries_keeps(kernel, shared):
    query, key, value = random_qkv(61, batch=2, heads=3)
    rule = RULE.replace(compressor=QueryAttention(window=3, kernel=kernel, shared_heads=shared))
    found = select(key, value, rule, query=query)
    assert found.indices.shape == (2, 3, 6, 3)
    for row in range(2):
        for p in range(6):
            scores = np.stack(
                [
                    slow_scores(query[row].unflatten(0, (3, 2))[head].numpy(), key[row, head].numpy(), p, kernel)
                    for head in range(3)
                ]
            )
            scores = np.broadcast_to(scores.sum(axis=0), scores.shape) if shared else scores
            np.testing.assert_allclose(found.scores[row, :, p].numpy(), scores, rtol=1e-10)
            best = np.sort(np.argsort(-scores, axis=-1, kind="stable")[:, :3], axis=-1)
            assert (found.indices[row, :, p] - (2 + 8 * p)).tolist() == best.tolist()


def test_other_queries_keep_other_tokens_and_only_those_of_windows_count():
    query, key, value = random_qkv(42)
    before = select(key, value, RULE, query=query).indices
    inside = (torch.arange(42) - 2) % 8 >= 5
    other = torch.where(inside[:, None], query, -3 * query)
    assert select(key, value, RULE, query=other).indices.equal(before)
    assert not select(key, value, RULE, query=-query).indices.equal(before)


def test_low_precision_is_scored_in_float32():
    query, key, value = (x.bfloat16() for x in random_qkv(42))
    found = select(key, value, RULE, query=query)
    assert found.scores.dtype == torch.float32
    assert found.indices.equal(select(key.float(), value.float(), RULE, query=query.float()).indices)


def test_packed_rows_are_scored_by_queries_of_their_own():
    query, key, value = random_qkv(90)
    packed = select(key, value, RULE, query=query, cu_seqlens=boundaries([1, 48, 0, 41])).indices
    first = select(key[:, :, 1:49], value[:, :, 1:49], RULE, query=query[:, :, 1:49]).indices + 1
    second = select(key[:, :, 49:], value[:, :, 49:], RULE, query=query[:, :, 49:]).indices + 49
    assert packed.equal(torch.cat([first, second], dim=2))


@pytest.mark.parametrize("given", [60, 48, 45])
def test_the_queries_from_the_first_window_on_are_enough(given):
    """Partition 1 is the first reference; its window starts at 2 + 2 * 8 - 3 = 15."""
    query, key, value = random_qkv(60)
    whole = sparse_attention(query, key, value, RULE)
    torch.testing.assert_close(sparse_attention(query[:, :, -given:], key, value, RULE), whole[:, :, -given:])
    last = select(key, value, RULE, query=query[:, :, -given:])
    assert last.indices.equal(select(key, value, RULE, query=query).indices)


def test_fewer_queries_are_refused_without_a_selection_and_right_with_one():
    query, key, value = random_qkv(60)
    few = query[:, :, 16:]
    with refused(
        "query", reason="QueryAttention needs the queries of tokens 15 to 59, but only the last 44 were given"
    ):
        sparse_attention(few, key, value, RULE)
    with refused("query", reason="the last 0 were given"):
        select(key, value, RULE)
    kept = select(key, value, RULE, query=query)
    whole = sparse_attention(query, key, value, RULE)
    torch.testing.assert_close(sparse_attention(few, key, value, RULE, selection=kept), whole[:, :, 16:])


def test_nothing_is_needed_before_the_first_compression():
    query, key, value = random_qkv(18)
    assert select(key, value, RULE).indices.shape == (1, 2, 0, 3)
    last = sparse_attention(query[:, :, -1:], key, value, RULE)
    torch.testing.assert_close(last, sparse_attention(query, key, value, RULE)[:, :, -1:])


@pytest.mark.parametrize(
    ("made", "field"),
    [
        (lambda: QueryAttention(window=0), "window"),
        (lambda: QueryAttention(window=2.0), "window"),
        (lambda: QueryAttention(kernel=4), "kernel"),
        (lambda: QueryAttention(shared_heads=1), "shared_heads"),
        (lambda: QueryRuns(size=0), "size"),
        (lambda: LagRelativeTail(tail=1.5), "tail"),
        (lambda: LagRelativeTail(tail=-0.1), "tail"),
        (lambda: RULE.replace(compressor=QueryAttention(window=9)), "compressor.init_args.window"),
    ],
)
def test_settings_outside_their_bounds_are_refused(made, field):
    with refused(field):
        made()


class MeanQuery(Compressor):
    """A synthesizer that lets gradient to the queries: their mean is the key of each pair."""

    window = 2

    def compress(self, partitions):
        means = partitions.next_query.mean(dim=(2, 4)).unsqueeze(-2)
        kept = partitions.value[..., : partitions.top_k, :]
        return means.expand_as(kept), kept


def test_gradient_flows_to_queries_that_a_synthesizer_uses():
    tensors = random_qkv(24, heads=1, dim=3, grad=True)
    rule = RULE.replace(sink_size=1, compressor=MeanQuery())
    assert torch.autograd.gradcheck(lambda *given: sparse_attention(*given, rule), tensors)


@pytest.mark.parametrize("compressor", [RULE.compressor, MeanQuery()], ids=["selector", "synthesizer"])
def test_the_kernels_find_the_queries_that_eager_pytorch_finds(compressor):
    pytest.importorskip("triton")
    tensors, rule = random_qkv(36, heads=1, dim=16, dtype=torch.float32), RULE.replace(compressor=compressor)
    whole, cut = sparse_attention(*tensors, rule, impl="eager"), boundaries([11, 25])
    stream, outputs, start = KeyValueStream(rule, "triton"), [], 0
    for size in (20, 1, 1, 14):
        outputs.append(stream.attend(*(x[:, :, start : start + size] for x in tensors), scale=0.25))
        start += size
    torch.testing.assert_close(torch.cat(outputs, dim=2), whole)
    ours, theirs = (sparse_attention(*tensors, rule, cu_seqlens=cut, impl=impl) for impl in ("triton", "eager"))
    torch.testing.assert_close(ours, theirs)
    last = sparse_attention(tensors[0][:, :, 15:], *tensors[1:], rule, impl="triton")
    torch.testing.assert_close(last, whole[:, :, 15:])


@pytest.mark.parametrize(
    ("tail", "top_k", "last"),
    [(0.0, 4, 0), (0.25, 4, 1), (0.25, 2, 1), (0.25, 1, 0), (0.5, 3, 2), (1, 3, 3), (1, 8, 8)],
)
def test_the_tail_is_kept_and_the_best_of_the_others(tail, top_k, last):
    _, key, value = random_qkv(61, batch=2)
    rule = RULE.replace(top_k=top_k, compressor=LagRelativeTail(tail, value_weight=0.5))
    found = select(key, value, rule)
    plain = select(key, value, rule.replace(compressor=LagRelative(value_weight=0.5)))
    assert found.scores.equal(plain.scores)
    for p in range(found.indices.shape[2]):
        scores = found.scores[:, :, p, : 8 - last]
        best = scores.sort(dim=-1, descending=True, stable=True).indices[..., : top_k - last].sort(dim=-1).values
        end = torch.arange(8 - last, 8).expand(2, 2, last)
        assert found.indices[:, :, p].equal(torch.cat([best, end], dim=-1) + 2 + 8 * p)


def test_of_equal_scores_the_earlier_is_kept_beside_the_tail():
    key = torch.ones(1, 1, 19, 4)
    rule = RULE.replace(top_k=4, compressor=LagRelativeTail(0.5))
    assert (select(key, key, rule).indices - 2).tolist() == [[[[0, 1, 6, 7]]]]
