"""Selectors with kernels of their own, beside the lag-relative ones, against eager PyTorch."""

from dataclasses import dataclass

import pytest
import torch
from helpers import refused
from ops.triton.oracle import DEVICE, inputs

from lrsa_lit.ops.sparse_attention import (
    KeyDiff,
    LagRelative,
    LagRelativeTail,
    QueryAttention,
    QueryRuns,
    Rule,
    eager,
    select,
    sparse_attention,
)
from lrsa_lit.ops.sparse_attention.selection import windows_of
from lrsa_lit.ops.sparse_attention.triton import launch as kernels
from lrsa_lit.ops.sparse_attention.triton.rank_kernel import rank_highest

SMALL = Rule(sink_size=4, lag_size=16, top_k=4, compressor=KeyDiff())
QUERIES = QueryAttention(window=3), QueryRuns(window=6, kernel=3, shared_heads=True, size=3)
SELECTORS = [KeyDiff(), LagRelativeTail(tail=0.3), *QUERIES]


def assert_same_selection(query, key, value, rule, cu_seqlens=None):
    exact = select(key.double(), value.double(), rule, query=query.double(), cu_seqlens=cu_seqlens, impl="eager")
    got = select(key, value, rule, query=query, cu_seqlens=cu_seqlens, impl="triton")
    torch.testing.assert_close(got.scores.double(), exact.scores, rtol=1e-5, atol=1e-6)
    assert torch.equal(got.indices, exact.indices)


@pytest.mark.parametrize("selector", [*SELECTORS, LagRelativeTail(tail=1.0, value_weight=0)], ids=str)
@pytest.mark.parametrize(
    ("batch", "lag", "keep", "dtype"),
    [(2, 16, 5, torch.float16), (2, 7, 3, torch.float32), (1, 130, 33, torch.float32), (1, 16, 0, torch.float32)],
)
def test_same_tokens_as_eager_pytorch(batch, lag, keep, dtype, selector):
    query, key, value, _ = inputs(batch, 4, 2, 3 * lag + 11, 24, dtype)
    assert_same_selection(query, key, value, SMALL.replace(lag_size=lag, top_k=keep, compressor=selector))


@pytest.mark.parametrize("selector", SELECTORS, ids=str)
def test_packed_sequences(selector):
    query, key, value, _ = inputs(1, 2, 2, 114, 16)
    boundaries = torch.tensor([0, 1, 6, 60, 114], dtype=torch.int32)
    assert_same_selection(query, key, value, SMALL.replace(compressor=selector), boundaries)


@pytest.mark.parametrize("selector", [KeyDiff(), QUERIES[0]], ids=str)
def test_any_layout(selector):
    tensors = [x.transpose(-1, -2).contiguous().transpose(-1, -2) for x in inputs(1, 4, 2, 75, 16)[:3]]
    assert_same_selection(*tensors, SMALL.replace(compressor=selector))


@pytest.mark.parametrize("selector", [KeyDiff(), QUERIES[0]], ids=str)
def test_equal_keys_go_to_the_earlier_token(selector):
    query, key, value, _ = inputs(1, 2, 1, 60, 16)
    key[:, :, 4:20] = key[:, :, 4:8].repeat(1, 1, 4, 1)
    key[:, :, 20:36] = 1.0
    indices = [
        select(key, value, SMALL.replace(compressor=selector), query=query, impl=impl).indices
        for impl in ("triton", "eager")
    ]
    assert torch.equal(*indices)
    assert indices[0][0, 0, 1].tolist() == [20, 21, 22, 23]


@pytest.mark.parametrize("length", [0.0, 1e-21, 1e-15, 1e15])
def test_keys_of_any_length(length):
    query, key, value, _ = inputs(1, 2, 1, 4 + 3 * 16, 16)
    key[:, :, 7::5] *= length
    assert_same_selection(query, key, value, SMALL)


@pytest.mark.parametrize("selector", SELECTORS, ids=str)
@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_keys_that_are_not_finite_keep_k_tokens(number, selector):
    query, key, value, _ = inputs(1, 2, 1, 60, 16)
    key[:, :, 25:35, 3] = number
    query[:, :, 34, 2] = number
    indices = select(key, value, SMALL.replace(compressor=selector), query=query, impl="triton").indices
    starts = 4 + 16 * torch.arange(indices.shape[2], device=DEVICE)[:, None]
    assert ((indices >= starts) & (indices < starts + 16)).all()
    assert (indices.diff(dim=-1) > 0).all()


@pytest.mark.parametrize("selector", SELECTORS, ids=str)
def test_partitions_of_a_call_keep_the_same_pairs(selector):
    query, key, value, _ = inputs(1, 4, 2, 75, 24)
    rule = SMALL.replace(compressor=selector, sink_size=0)
    windows = windows_of(query, key, rule, 3)
    ours, theirs = (run.compress(key, value, rule, 3, 2, windows) for run in (kernels, eager))
    assert all(map(torch.equal, ours, theirs))
    assert not any(tensor.requires_grad for tensor in ours)


@pytest.mark.parametrize("selector", [LagRelative(), *SELECTORS], ids=str)
def test_pairs_that_the_kernels_keep_have_gradients(selector):
    query, key, value, _ = inputs(1, 4, 2, 75, 24)
    rule = SMALL.replace(compressor=selector, sink_size=0)
    tensors, results = [key.clone().requires_grad_(), value.clone().requires_grad_()], []
    for run in (kernels, eager):
        pairs = run.compress(*tensors, rule, 3, 2, windows_of(query, key, rule, 3))
        grads = torch.autograd.grad(sum((each * each.detach().cos()).sum() for each in pairs), tensors)
        results.append([*pairs, *grads])
    assert all(map(torch.equal, *results))
    assert any(grad.any() for grad in results[0][2:])


@pytest.mark.parametrize(
    ("selector", "keep", "boundaries"),
    [(KeyDiff(), 5, None), (LagRelativeTail(), 5, [0, 40, 50]), (QUERIES[1], 7, None)],
)
def test_the_operator_and_its_gradients(selector, keep, boundaries):
    *tensors, gradient = inputs(1, 2, 1, 50, 16)
    rule, results = SMALL.replace(top_k=keep, compressor=selector), []
    cu_seqlens = None if boundaries is None else torch.tensor(boundaries, dtype=torch.int32)
    for impl in ("triton", "eager"):
        leaves = [tensor.detach().requires_grad_() for tensor in tensors]
        output = sparse_attention(*leaves, rule, cu_seqlens=cu_seqlens, impl=impl)
        results.append([output, *torch.autograd.grad(output, leaves, gradient)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("window", [1, 16])
def test_queries_from_the_first_window_on_are_needed(window):
    query, key, value, _ = inputs(1, 4, 2, 71, 16)
    rule = SMALL.replace(compressor=QueryAttention(window))
    assert_same_selection(query[:, :, 36 - window :], key, value, rule)
    for given in (query[:, :, 37 - window :], None):
        with refused("query"):
            select(key, value, rule, query=given, impl="triton")
    assert select(key[:, :, :36], value[:, :, :36], rule, impl="triton").indices.numel() == 0


@dataclass(frozen=True)
class MostLike(KeyDiff):
    """The opposite, which no kernel knows."""

    def score(self, partitions):
        return -super().score(partitions)


def test_a_subclass_scores_by_itself():
    _, key, value, _ = inputs(1, 2, 2, 75, 16)
    rule = SMALL.replace(compressor=MostLike())
    chosen = [select(key, value, rule, impl=impl) for impl in ("triton", "eager")]
    assert torch.equal(*(selection.indices for selection in chosen))
    assert (chosen[0].scores > 0).any()


@pytest.mark.parametrize("lag", [5, 128, 200])
def test_any_order_is_ranked_as_torch_sorts_it(lag):
    generator = torch.Generator().manual_seed(lag)
    order = torch.randn(2, 2, 1, lag, generator=generator)
    order[0] = order[0].round()  # Many ties, and zeros of both signs.
    infinity = float("inf")
    order[1, :, :, :4] = torch.tensor([float("nan"), -infinity, infinity, float("nan")])
    order[1, 1] = order[1, 1, :, torch.randperm(lag, generator=generator)]
    for keep in (0, 1, lag // 3, lag):
        kept = order.sort(dim=-1, descending=True, stable=True).indices[..., :keep].sort(dim=-1).values
        expected = torch.full_like(order, -1, dtype=torch.int32)
        expected.scatter_(-1, kept, torch.arange(keep, dtype=torch.int32).expand(kept.shape))
        assert torch.equal(rank_highest(order.to(DEVICE), keep).cpu(), expected)
