"""Compressors that make new pairs, held to recorded vectors and to their definitions in loops."""

import json
import math

import pytest
import torch
from helpers import VECTORS, oracle_attention, random_qkv, refused

from lrsa_lit.ops.sparse_attention import FreqPartition, KeyValueStream, Partitions, Rotary, Rule, sparse_attention


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
    with refused("compressor", "FreqPartition", reason="give the rule a Rotary"):
        sparse_attention(*tensors, rule)
    stream = KeyValueStream(rule)
    with refused("compressor", "FreqPartition", reason="give the rule a Rotary"):
        stream.attend(*tensors, 1.0)
    with refused("rotary", 1.0, "a Rotary, or none"):
        Rule(rotary=1.0)
