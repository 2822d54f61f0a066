"""Fused selection against eager PyTorch in float64: equal where the scores at the cut differ by more than rounding."""

from dataclasses import dataclass

import pytest
import torch
from ops.triton.oracle import DEVICE, inputs

from lrsa_lit.ops.sparse_attention import LagRelative, Recency, Rule, SpreadSelector, ValueRelative, eager, select
from lrsa_lit.ops.sparse_attention.triton import launch as kernels

CLOSE = 1e-6
"""Relative distance of the K-th and the next score under which two correct implementations may differ."""


def assert_same_selection(key, value, config, cu_seqlens=None):
    exact = select(key.double(), value.double(), config, cu_seqlens=cu_seqlens, impl="eager")
    got = select(key, value, config, cu_seqlens=cu_seqlens, impl="triton")
    torch.testing.assert_close(got.scores.double(), exact.scores, rtol=1e-4, atol=1e-7)
    assert got.indices.shape == exact.indices.shape
    differ = (got.indices != exact.indices).any(dim=-1)
    if 0 < config.top_k < config.lag_size:
        ranked = exact.scores.sort(dim=-1, descending=True).values
        at_cut, next_one = ranked[..., config.top_k - 1], ranked[..., config.top_k]
        assert not (differ & (at_cut - next_one > CLOSE * at_cut)).any()
    assert differ.sum() <= max(1, 0.002 * differ.numel())


@pytest.mark.parametrize("weight", [0.0, 1.0, 0.3])
@pytest.mark.parametrize(("lag", "keep"), [(16, 5), (7, 3), (100, 33), (128, 0), (32, 32)])
def test_same_tokens_as_eager_pytorch(lag, keep, weight):
    _, key, value, _ = inputs(2, 2, 2, 4 * lag + 11, 24)
    assert_same_selection(key, value, Rule(5, lag, keep, compressor=LagRelative(value_weight=weight)))


@dataclass(frozen=True)
class Weighted(SpreadSelector):
    """Weights of one's own."""

    of_key: float
    of_value: float

    @property
    def weights(self):
        return self.of_key, self.of_value


@pytest.mark.parametrize("selector", [ValueRelative(), Weighted(0.0, 0.4), Weighted(0.7, 0.2)])
@pytest.mark.parametrize("transposed", ["key", "value"])
def test_each_score_is_weighed_and_read_with_its_own_strides(selector, transposed):
    _, key, value, _ = inputs(2, 2, 2, 75, 24)
    if transposed == "key":
        key = key.transpose(1, 2).contiguous().transpose(1, 2)
    else:
        value = value.transpose(1, 2).contiguous().transpose(1, 2)
    assert_same_selection(key, value, Rule(5, 16, 5, compressor=selector))


@pytest.mark.parametrize("selector", [LagRelative(), ValueRelative()])
def test_partitions_of_a_call_keep_the_same_pairs(selector):
    _, key, value, _ = inputs(2, 2, 2, 75, 24)
    config = Rule(5, 16, 5, compressor=selector)
    expected = eager.compress(key, value, config, 3, first=2)
    for ours, theirs in zip(kernels.compress(key, value, config, 3, first=2), expected, strict=True):
        assert torch.equal(ours, theirs)


def test_pairs_that_want_gradients_pass_them_on():
    _, key, value, _ = inputs(1, 2, 2, 75, 24)
    config, gradients = Rule(5, 16, 5), []
    for compress in (kernels.compress, eager.compress):
        leaves = [tensor.detach().requires_grad_() for tensor in (key, value)]
        compact = compress(*leaves, config, 3, first=0)
        gradients.append(torch.autograd.grad(sum(part.square().sum() for part in compact), leaves))
    for ours, theirs in zip(*gradients, strict=True):
        assert torch.equal(ours, theirs)
        assert ours.any()


def test_packed_sequences():
    _, key, value, _ = inputs(1, 2, 2, 206, 16)
    boundaries = torch.tensor([0, 1, 6, 106, 206], dtype=torch.int32)
    assert_same_selection(key, value, Rule(4, 16, 4), boundaries)


def test_ties_go_to_the_earlier_token():
    key = torch.ones(1, 1, 52, 16, device=DEVICE)
    indices = select(key, key, Rule(4, 16, 4), impl="triton").indices
    assert indices.tolist() == [[[[4, 5, 6, 7], [20, 21, 22, 23]][: indices.shape[2]]]]


def test_constant_channels_count_as_zero():
    _, key, value, _ = inputs(1, 2, 2, 90, 16)
    key[..., :3] = 7.0
    value[..., 5] = 0.0
    assert_same_selection(key, value, Rule(4, 16, 4))


def assert_same_order(key, value, config):
    """What is kept is what eager PyTorch keeps in float64, for all kinds of K."""
    for keep in range(1, config.lag_size, 2):
        rule = config.replace(top_k=keep)
        exact = select(key.double(), value.double(), rule, impl="eager").indices
        assert torch.equal(select(key, value, rule, impl="triton").indices, exact)


def dominated(dtype):
    """One token of every other partition dwarfs all others, whose scores round to 0."""
    _, key, value, _ = inputs(1, 2, 2, 5 + 4 * 16, 24, dtype)
    key[:, :, 7::32] *= 1000
    value[:, :, 12::32] *= 1000
    return key, value


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("weight", [0.0, 1e-6, 0.5, 1e6, 1e30])
def test_the_tokens_beside_one_that_dominates_are_ranked_too(weight, dtype):
    assert_same_order(*dominated(dtype), Rule(4, 16, 4, compressor=LagRelative(value_weight=weight)))


@pytest.mark.parametrize("selector", [ValueRelative(), Weighted(0.0, 0.4), Weighted(1e-6, 0.2), Weighted(3.0, 1e-30)])
def test_any_weights_rank_the_tokens_beside_one_that_dominates(selector):
    assert_same_order(*dominated(torch.float32), Rule(4, 16, 4, compressor=selector))


def test_a_partition_far_from_its_reference_keeps_its_order():
    _, key, value, _ = inputs(1, 2, 2, 5 + 4 * 16, 24)
    key[:, :, 4:20] *= 1e25
    assert select(key, value, Rule(4, 16, 4), impl="triton").scores.isfinite().all()
    assert_same_order(key, value, Rule(4, 16, 4))


def test_scores_that_are_not_finite_keep_k_tokens():
    _, key, value, _ = inputs(1, 2, 2, 90, 16)
    key[:, :, 30:40] = float("nan")
    value[:, :, 50:60, 2] = float("inf")
    config = Rule(4, 16, 4)
    indices = select(key, value, config, impl="triton").indices
    starts = config.sink_size + config.lag_size * torch.arange(indices.shape[2], device=DEVICE)[:, None]
    assert ((indices >= starts) & (indices < starts + config.lag_size)).all()
    assert (indices.diff(dim=-1) > 0).all()


def test_other_compressors_select_as_they_do():
    _, key, value, _ = inputs(1, 2, 2, 90, 16)
    config = Rule(4, 16, 4, compressor=Recency())
    chosen = [select(key, value, config, impl=impl).indices for impl in ("triton", "eager")]
    assert torch.equal(*chosen)
