"""The operator against the oracle: outputs and gradients in float64, over every parameter of the rule."""

import pytest
import torch
from helpers import boundaries, lag_relative, mean_pool, oracle_attention, random_qkv
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from lrsa_lit.ops.sparse_attention import LagRelative, MeanPool, Rule, sparse_attention

COMPRESS = {LagRelative: lag_relative, MeanPool: mean_pool}


@st.composite
def cases(draw):
    """A rule, the lengths of packed sequences, and the sizes of the tensors."""
    lag = draw(st.integers(2, 9))
    rule = Rule(
        sink_size=draw(st.integers(0, 5)),
        lag_size=lag,
        top_k=draw(st.integers(0, lag)),
        chunk_size=draw(st.one_of(st.none(), st.integers(1, 2 * lag + 1))),
        compressor=draw(st.sampled_from([*(LagRelative(value_weight=weight) for weight in (0, 0.5, 1)), MeanPool()])),
    )
    packed = draw(st.booleans())
    lengths = draw(st.lists(st.integers(0, 40), min_size=1, max_size=3).filter(sum)) if packed else None
    length = sum(lengths) if lengths else draw(st.integers(1, 60))
    sizes = {"heads": draw(st.integers(1, 2)), "group": draw(st.integers(1, 3)), "dim": draw(st.integers(2, 5))}
    batch = 1 if packed else draw(st.integers(1, 2))
    queries = length if packed else draw(st.one_of(st.just(length), st.integers(1, length)))
    return (
        rule,
        lengths,
        {"length": length, "batch": batch, "queries": queries, "seed": draw(st.integers(0, 99))} | sizes,
    )


def check(rule, sizes, *, lengths=None, **options):
    """Output and gradients of the operator equal the oracle's to rounding."""
    tensors = random_qkv(**sizes, grad=True)
    ours = sparse_attention(*tensors, rule, cu_seqlens=boundaries(lengths) if lengths else None, **options)
    theirs = oracle_attention(*tensors, rule, lengths=lengths, compress=COMPRESS[type(rule.compressor)], **options)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    weights = torch.randn(ours.shape, generator=torch.Generator().manual_seed(1), dtype=ours.dtype)
    for name, mine, reference in zip(
        ("query", "key", "value"),
        torch.autograd.grad((ours * weights).sum(), tensors),
        torch.autograd.grad((theirs * weights).sum(), tensors),
        strict=True,
    ):
        torch.testing.assert_close(mine, reference, rtol=1e-9, atol=1e-11, msg=lambda text, n=name: f"d{n}: {text}")


@settings(max_examples=250)
@given(cases())
def test_outputs_and_gradients_are_the_oracles(case):
    rule, lengths, sizes = case
    check(rule, sizes, lengths=lengths)


RULE = Rule(sink_size=3, lag_size=8, top_k=3)
FIRST = RULE.first_compression


@pytest.mark.parametrize(
    ("changes", "sizes"),
    [
        *(({}, {"length": n}) for n in (1, 2, 3, 4, 11, 67, *(FIRST + m for m in (-1, 0, 1, 2, 8, 9)))),
        *(({"chunk_size": n, "top_k": k}, {"length": 63}) for n in (8, 4, 1, 16, 12, 5) for k in (0, 1, 8)),
        *(({}, {"length": 53, "heads": n, "group": group}) for n, group in ((1, 1), (1, 4), (4, 1), (3, 2))),
        *(({}, {"length": 53, "dim": n}) for n in (2, 3, 7, 17)),
        *(({"sink_size": n}, {"length": n + 47}) for n in (0, 1, 50)),
        *(({}, {"length": 53, "queries": n}) for n in (1, 2, 7, 30, 52)),
    ],
    ids=str,
)
def test_the_ends_of_the_ranges(changes, sizes):
    check(RULE.replace(**changes), sizes)


@pytest.mark.parametrize("change", ["equal-keys", "equal-tokens", "huge-keys", "shifted-keys", "constant-channel"])
def test_odd_keys_and_values(change):
    query, key, value = random_qkv(70)
    if change in ("equal-keys", "equal-tokens"):
        key[:] = 0.5
    if change == "equal-tokens":
        value[:, :, 19:] = 2.0
    if change == "huge-keys":
        key *= 1e4
    if change == "shifted-keys":
        key += 1e4
    if change == "constant-channel":
        key[..., 0] = value[..., 1] = 3.0
    ours = sparse_attention(query, key, value, RULE)
    torch.testing.assert_close(ours, oracle_attention(query, key, value, RULE), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("scale", [0.05, 1.0, 0.0])
def test_the_scale_multiplies_the_scores(scale):
    check(RULE, {"length": 40}, scale=scale)


def test_a_synthesizer_hands_gradient_to_every_pooled_token_that_no_raw_range_holds():
    rule = Rule(2, 4, 1, compressor=MeanPool())
    query, key, value = random_qkv(30, grad=True)
    last = sparse_attention(query, key, value, rule)[:, :, -1]
    for tensor, gradient in zip(("key", "value"), torch.autograd.grad(last.sum(), (key, value)), strict=True):
        assert (gradient.abs().sum(dim=-1) > 0).all(), tensor
        pooled = gradient[:, :, 2:6]
        torch.testing.assert_close(pooled, pooled.mean(dim=2, keepdim=True).expand_as(pooled))


def test_a_selector_hands_gradient_to_visible_tokens_only():
    query, key, value = random_qkv(60, grad=True)
    last = sparse_attention(query, key, value, RULE)[:, :, -1]
    (gradient,) = torch.autograd.grad(last.sum(), value)
    touched = (gradient.abs().sum(dim=-1) > 0).sum(dim=-1)
    # P = (59 - 19) // 8 + 1 = 6 partitions; 3 sinks, 3 x 6 kept and the raw 51 ... 59.
    assert touched.tolist() == [[3 + 18 + 9] * 2]


def dense(query, key, value, **options):
    return functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True, **options)


@pytest.mark.parametrize("chunk", [None, 5, 12])
def test_keeping_all_is_dense_attention_and_keeping_fewer_is_not(chunk):
    rule = Rule(3, 8, 8, chunk)
    query, key, value = random_qkv(100, batch=2)
    torch.testing.assert_close(sparse_attention(query, key, value, rule), dense(query, key, value))
    for top_k in (0, 3, 7):
        sparse = sparse_attention(query, key, value, rule.replace(top_k=top_k))
        gap = (sparse - dense(query, key, value)).abs().amax(dim=(0, 1, 3))
        assert (gap[:FIRST] < 1e-12).all()
        assert (gap[FIRST + 8 :] > 1e-3).float().mean() > 0.9, "most later queries must lose something"


def test_the_last_partitions_of_the_future_do_not_reach_back():
    query, key, value = random_qkv(70)
    before = sparse_attention(query, key, value, RULE)
    for t in (20, 34, 35, 36, 50):
        changed = [tensor.clone() for tensor in (key, value)]
        for tensor in changed:
            tensor[:, :, t + 1 :] *= -3
        assert sparse_attention(query, *changed, RULE)[:, :, : t + 1].equal(before[:, :, : t + 1])


@pytest.mark.parametrize("order", ["contiguous", "heads-last"])
def test_strided_inputs_are_read_as_they_lie(order):
    made = random_qkv(50)
    tensors = made if order == "contiguous" else [x.transpose(1, 2).contiguous().transpose(1, 2) for x in made]
    torch.testing.assert_close(sparse_attention(*tensors, RULE), oracle_attention(*made, RULE))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_low_precision_errs_no_more_than_dense_attention_of_that_precision(dtype):
    tensors = random_qkv(120, heads=2, dim=16, dtype=dtype)
    exact = [tensor.double() for tensor in tensors]
    ours = sparse_attention(*tensors, RULE)
    assert ours.dtype == dtype
    error = (ours.double() - oracle_attention(*exact, RULE)).abs().max()
    budget = (dense(*tensors).double() - dense(*exact)).abs().max()
    assert error <= 2 * budget


@pytest.mark.parametrize("compressor", [LagRelative(), MeanPool()], ids=lambda c: type(c).__name__)
def test_gradcheck(compressor):
    rule = Rule(1, 3, 2, compressor=compressor)
    tensors = random_qkv(14, heads=1, group=2, dim=2, grad=True)
    assert torch.autograd.gradcheck(lambda q, k, v: sparse_attention(q, k, v, rule), tensors)


@pytest.mark.parametrize("chunk", [1, 2, 3, 4, 6])
def test_every_chunk_that_divides_the_lag_gives_the_same_bits(chunk):
    rule = Rule(3, 12, 4)
    tensors = random_qkv(111)
    assert sparse_attention(*tensors, rule.replace(chunk_size=chunk)).equal(sparse_attention(*tensors, rule))
    assert not sparse_attention(*tensors, rule.replace(chunk_size=24)).equal(sparse_attention(*tensors, rule))
