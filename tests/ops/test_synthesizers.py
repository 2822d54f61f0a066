"""Compressors that make new pairs, held to recorded vectors and to their definitions in loops."""

import itertools
import json
import math

import pytest
import torch
from helpers import VECTORS, boundaries, oracle_attention, random_qkv, refused

from lrsa_lit.ops.sparse_attention import (
    Centroids,
    FreqPartition,
    KeyValueStream,
    MeanPool,
    Partitions,
    Rotary,
    Rule,
    implementation,
    sparse_attention,
    through_channels,
)
from lrsa_lit.ops.sparse_attention.buffer import joined
from lrsa_lit.ops.sparse_attention.selection import compact_buffer, compact_buffer_of_packed
from lrsa_lit.ops.sparse_attention.slot_bias import CHANNELS, narrow, with_bias


def vectors(name):
    return json.loads((VECTORS / f"systems/{name}.json").read_text())


def one_partition(key, value, top_k, *, start=0, rotary=None):
    """A partition of some heads (H, L, D), which is its own reference."""
    key, value = key[None, :, None], value[None, :, None]
    return Partitions(key, value, key, value, top_k, start=start, rotary=rotary)


def by_cosines(lag, kept):
    """FreqKV's transform from its definition: orthonormal DCT-II, the lowest K, orthonormal inverse, sqrt(K / L)."""

    def basis(size):
        rows = [[math.cos(math.pi * m * (2 * l + 1) / (2 * size)) for l in range(size)] for m in range(size)]  # noqa: E741
        scales = torch.tensor([(1 if m == 0 else 2) / size for m in range(size)], dtype=torch.float64).sqrt()
        return scales[:, None] * torch.tensor(rows, dtype=torch.float64).view(size, size)

    return math.sqrt(kept / lag) * basis(kept).T @ basis(lag)[:kept]


def freq_partition(rotary, start):
    """For the oracle: a partition that starts at a position, which one makes no difference."""

    def compress(key, value, next_key, next_value, rule):
        lag, kept = len(key), rule.top_k
        weights = by_cosines(lag, kept)
        middle = start + (2 * torch.arange(kept) + 1) * lag / (2 * max(kept, 1)) - 0.5
        raw = rotary.unrotate(key, start + torch.arange(lag))
        return rotary.rotate(weights @ raw, middle), weights @ value

    return compress


def test_freq_partition_gives_the_recorded_pairs():
    recorded = vectors("freqkv")
    case, rotary = recorded["partition_adaptation"], Rotary.plain(4)
    lag, kept, start = (case["params"][name] for name in ("L", "K", "start"))
    key, value = (torch.tensor(recorded["inputs"][name], dtype=torch.float64)[:, start : start + lag] for name in "kv")
    rotated = rotary.rotate(key, start + torch.arange(lag))
    found = FreqPartition().compress(one_partition(rotated, value, kept, start=start, rotary=rotary))
    for pairs, name in zip(found, ("rotated_compact_key", "compact_value"), strict=True):
        torch.testing.assert_close(pairs[0, :, 0], torch.tensor(case[name], dtype=torch.float64), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("lag", "kept"), [(8, 0), (8, 1), (7, 3), (8, 8), (5, 4)])
def test_freq_partition_is_the_transform_of_each_channel(lag, kept):
    key, value = torch.randn(2, 3, lag, 6, dtype=torch.float64)
    found = FreqPartition().compress(one_partition(key, value, kept, rotary=Rotary(())))
    for pairs, tokens in zip(found, (key, value), strict=True):
        torch.testing.assert_close(pairs[0, :, 0], by_cosines(lag, kept) @ tokens)
    constant = FreqPartition().compress(one_partition(key, torch.ones_like(value), kept, rotary=Rotary(())))[1]
    torch.testing.assert_close(constant, torch.ones_like(constant))


def test_freq_partition_with_all_frequencies_is_dense():
    rotary, key = Rotary.plain(6), torch.randn(2, 8, 6)
    found, _ = FreqPartition().compress(one_partition(key, key, 8, start=100, rotary=rotary))
    torch.testing.assert_close(found[0, :, 0], key)


@pytest.mark.parametrize("rotary", [Rotary.plain(6, theta=20.0), Rotary((0.9,), 1.4)], ids=["all", "some"])
def test_freq_partition_attends_as_defined(rotary):
    tensors = random_qkv(43, heads=2, group=2, dim=6, grad=True)
    rule = Rule(3, 7, 2, compressor=FreqPartition(), rotary=rotary)
    outputs = sparse_attention(*tensors, rule), oracle_attention(*tensors, rule, compress=freq_partition(rotary, 70))
    torch.testing.assert_close(*outputs)
    torch.testing.assert_close(*(torch.autograd.grad(output.square().sum(), tensors) for output in outputs))


def test_half_precision_costs_rounding_only():
    rotary, key = Rotary.plain(64), torch.randn(2, 128, 64).bfloat16()
    half, exact = (
        FreqPartition().compress(one_partition(tokens, tokens, 32, rotary=rotary)) for tokens in (key, key.double())
    )
    for rounded, pairs in zip(half, exact, strict=True):
        assert rounded.dtype == torch.bfloat16
        assert (rounded - pairs).norm() / pairs.norm() < 0.0025


def test_a_rule_without_a_rotation_is_refused():
    rule, tensors = Rule(2, 4, 2, compressor=FreqPartition()), random_qkv(20)
    with refused("compressor", "FreqPartition", reason="the rule needs a Rotary"):
        sparse_attention(*tensors, rule)
    stream = KeyValueStream(rule)
    with refused("compressor", "FreqPartition", reason="the rule needs a Rotary"):
        stream.attend(*tensors, 1.0)
    with refused("rotary", 1.0, "a Rotary, or none"):
        Rule(rotary=1.0)


def clusters(key, count, rounds):
    """Lists of the members of each cluster of keys (L, D): k-means on unit keys, in loops."""
    unit = [row / max(float(row.norm()), 1e-12) for row in key.detach()]
    centres = [unit[j * len(unit) // count] for j in range(count)]
    for _ in range(rounds):
        nearest = [min(range(count), key=lambda j: float((row - centres[j]).square().sum())) for row in unit]
        members = [[place for place, j in enumerate(nearest) if j == cluster] for cluster in range(count)]
        centres = [
            torch.stack([unit[place] for place in places]).mean(dim=0) if places else centre
            for places, centre in zip(members, centres, strict=True)
        ]
    return members


def repeated_means(key, value, next_key, next_value, rule):
    """For the oracle: a bias of log n is n equal slots, and an empty cluster is none."""
    found = [places for places in clusters(key, rule.top_k, rule.compressor.iterations) if places]
    if not rule.compressor.weigh:
        return tuple(torch.stack([tokens[places].mean(dim=0) for places in found]) for tokens in (key, value))
    return tuple(torch.stack([tokens[g].mean(dim=0) for g in found for _ in g]) for tokens in (key, value))


def test_centroids_are_the_recorded_ones():
    recorded = vectors("squeezed")
    case = recorded["partition_adaptation"]
    key = torch.tensor(recorded["inputs"]["keys"], dtype=torch.float64)[0, :, :12]
    value = torch.tensor(case["values"], dtype=torch.float64)
    keys, values, bias = Centroids().compress(one_partition(key, value, 3))
    for head, expected in enumerate(case["per_head"]):
        for found, name in ((keys, "compact_key"), (values, "compact_value"), (bias.exp(), "members")):
            torch.testing.assert_close(found[0, head, 0], torch.tensor(expected[name]).double(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("weigh", [True, False])
@pytest.mark.parametrize(("kept", "rounds"), [(1, 1), (3, 2), (7, 1)])
def test_centroids_attend_as_their_members_did(weigh, kept, rounds):
    tensors = random_qkv(43, heads=2, group=2, dim=3, grad=True)
    rule = Rule(3, 7, kept, compressor=Centroids(rounds, weigh))
    outputs = (
        sparse_attention(*tensors, rule, scale=0.7),
        oracle_attention(*tensors, rule, compress=repeated_means, scale=0.7),
    )
    torch.testing.assert_close(*outputs)
    torch.testing.assert_close(*(torch.autograd.grad(output.square().sum(), tensors) for output in outputs))


def test_equal_keys_are_one_cluster_and_empty_ones_weigh_nothing():
    """However far the logits are apart from those of an empty cluster."""
    query, key, value = random_qkv(43, heads=1, group=2, dim=3)
    for size in (1.0, 1e4):
        same = size * key[:, :, :1].expand_as(key).clone()
        rule = Rule(0, 7, 3, compressor=Centroids())
        *_, bias = Centroids().compress(one_partition(same[0, :, :7], value[0, :, :7], 3))
        assert bias.flatten().tolist() == [pytest.approx(math.log(7)), -1e4, -1e4]
        output = sparse_attention(query, same, value, rule)
        means = value.cumsum(dim=2) / torch.arange(1, 44)[:, None]
        torch.testing.assert_close(output, means.repeat(1, 2, 1, 1))
    for other in (float("inf"), float("nan")):
        assert sparse_attention(query, key * other, value, rule).shape == query.shape


def test_as_many_clusters_as_tokens_are_dense_and_none_are_the_window():
    tensors = random_qkv(43, heads=2, group=2, dim=3)
    dense = sparse_attention(*tensors, Rule(3, 7, 7))
    torch.testing.assert_close(sparse_attention(*tensors, Rule(3, 7, 7, compressor=Centroids())), dense)
    window = sparse_attention(*tensors, Rule(3, 7, 0))
    torch.testing.assert_close(sparse_attention(*tensors, Rule(3, 7, 0, compressor=Centroids())), window)


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)])
def test_a_bias_in_half_precision_is_as_exact_as_the_rest(dtype, most):
    query, key, value = random_qkv(90, heads=2, group=2, dim=16, dtype=dtype)
    rule = Rule(3, 16, 2, compressor=Centroids())
    exact = sparse_attention(*(x.double() for x in (query, key, value)), rule)
    assert (sparse_attention(query, key, value, rule) - exact).abs().max() < most


@pytest.mark.parametrize("scale", [0.0, -0.3, 0.3])
def test_a_bias_is_added_whatever_the_scale(scale):
    """By the token-by-token stream, whose store decoding attends to in one step."""
    tensors = random_qkv(43, batch=2, heads=2, group=2, dim=3)
    rule = Rule(3, 7, 2, compressor=Centroids())
    expected = oracle_attention(*tensors, rule, compress=repeated_means, scale=scale)
    torch.testing.assert_close(sparse_attention(*tensors, rule, scale=scale), expected)
    stream = KeyValueStream(rule)
    parts = [stream.attend(*(x[:, :, part] for x in tensors), scale) for part in map(slice, *_ends([20, 1, 22]))]
    torch.testing.assert_close(torch.cat(parts, dim=2), expected)
    assert stream.stored[0].shape[-1] == 3
    key, value = stream.buffer.filled
    length = torch.tensor([key.shape[2]], dtype=torch.int32)

    def attend(query, *_):
        return implementation("auto", query).attend_one(query, key, value, length, _[-1])

    last = through_channels(attend, *(x[:, :, -1:] for x in tensors), scale)
    torch.testing.assert_close(last, expected[:, :, -1:])


def _ends(sizes):
    ends = [0, *itertools.accumulate(sizes)]
    return ends[:-1], ends[1:]


def test_gradients_reach_a_bias_that_has_one():
    """Through channels in which a float32 is two numbers of half precision."""
    query, key, value = random_qkv(5, heads=1, group=1, dim=4)
    bias = torch.randn(1, 1, 5, dtype=torch.float64, requires_grad=True)

    def attend(query, key, value, scale):
        return sparse_attention(query, *with_bias(narrow(key), narrow(value), bias), Rule(0, 16, 4), scale=scale)

    logits = (query @ key.mT * 0.5 + bias).masked_fill(~torch.ones(5, 5, dtype=torch.bool).tril(), -math.inf)
    expected = logits.softmax(dim=-1) @ value
    output = through_channels(attend, query, key, value, 0.5)
    torch.testing.assert_close(output, expected)
    gradients = [torch.autograd.grad(found.square().sum(), bias) for found in (output, expected)]
    torch.testing.assert_close(*gradients)


def test_packed_rows_with_a_bias_are_alone():
    tensors, rule = random_qkv(60, heads=2, group=2, dim=3), Rule(2, 5, 2, compressor=Centroids(2))
    packed = sparse_attention(*tensors, rule, cu_seqlens=boundaries([25, 35]))
    alone = [sparse_attention(*(x[:, :, part] for x in tensors), rule) for part in (slice(25), slice(25, None))]
    torch.testing.assert_close(packed, torch.cat(alone, dim=2))


@pytest.mark.parametrize("iterations", [0, 1.5, True])
def test_rounds_are_counted(iterations):
    with refused("iterations", iterations, "an integer >= 1"):
        Centroids(iterations)
    with refused("weigh", "yes", "true or false"):
        Centroids(weigh="yes")


@pytest.mark.parametrize("lengths", [[30, 4, 21, 9, 47], [4, 9]], ids=["long and short", "none compressed"])
@pytest.mark.parametrize("compressor", [Centroids(), FreqPartition(), MeanPool()], ids=lambda each: type(each).__name__)
def test_partitions_of_packed_rows_are_compressed_in_one_call(compressor, lengths):
    """To the same pairs, in the same order, as sequence by sequence."""
    rule = Rule(2, 6, 3, compressor=compressor, rotary=Rotary.plain(4))
    bounds = [0, *itertools.accumulate(lengths)]
    _, key, value = random_qkv(bounds[-1], dim=4)
    if compressor.has_bias:
        key, value = (torch.nn.functional.pad(tokens, (0, CHANNELS)) for tokens in (key, value))
    parts = [slice(*bound) for bound in itertools.pairwise(bounds)]
    expected = joined(*(compact_buffer(key[:, :, part], value[:, :, part], rule) for part in parts))
    torch.testing.assert_close(compact_buffer_of_packed(key, value, rule, bounds), expected, rtol=0, atol=1e-12)
