"""The operator of compiled layers, its rule in a tensor, against the operator itself."""

import pytest
import torch
from helpers import refused
from ops.triton.oracle import inputs

from lrsa_lit.ops.sparse_attention import (
    HeadRules,
    KeyDiff,
    LagRelative,
    LagRelativeTail,
    QueryRuns,
    RandomTokens,
    Rule,
    ValueRelative,
    sparse_attention,
    tensor_of_heads,
    tensor_of_rule,
    traced_attention,
)

SMALL = Rule(sink_size=4, lag_size=16, top_k=4)


def assert_same(tensors, config, cu_seqlens=None, scale=0.25, attention=traced_attention):
    """Outputs and gradients are equal bit by bit."""
    results = []
    for run, rule in (
        (attention, tensor_of_heads(config) if isinstance(config, HeadRules) else tensor_of_rule(config)),
        (sparse_attention, config),
    ):
        leaves = [tensor.detach().requires_grad_() for tensor in tensors[:3]]
        options = {"impl": "triton"} if run is sparse_attention else {}
        output = run(*leaves, rule, cu_seqlens=cu_seqlens, scale=scale, **options)
        results.append([output, *torch.autograd.grad(output, leaves, tensors[3])])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(SMALL, id="C=L"),
        pytest.param(SMALL.replace(chunk_size=24), id="C=1.5L"),
        pytest.param(SMALL.replace(top_k=0), id="K=0"),
        pytest.param(SMALL.replace(top_k=16), id="K=L"),
        pytest.param(SMALL.replace(compressor=LagRelative(value_weight=0.3)), id="w=0.3"),
        pytest.param(SMALL.replace(compressor=LagRelative(value_weight=0)), id="w=0"),
        pytest.param(SMALL.replace(compressor=ValueRelative()), id="values"),
        pytest.param(SMALL.replace(compressor=KeyDiff()), id="KeyDiff"),
        pytest.param(SMALL.replace(compressor=LagRelativeTail(tail=0.5)), id="tail"),
        pytest.param(SMALL.replace(compressor=QueryRuns(3, kernel=3, shared_heads=True, size=2)), id="queries"),
        pytest.param(Rule(0, 14, 3), id="S=0 L=14"),
    ],
)
def test_rule(config):
    assert_same(inputs(1, 2, 1, 75, 16), config)


def test_heads_that_differ_in_k():
    assert_same(inputs(2, 3, 3, 19, 16), HeadRules(Rule(2, 8, 3, compressor=LagRelativeTail()), (3, 8, 3)))


@pytest.mark.parametrize("length", [1, 35, 36, 37])
def test_length(length):
    assert_same(inputs(1, 2, 1, length, 16), SMALL)


def test_packed():
    assert_same(inputs(1, 4, 2, 90, 16), SMALL, torch.tensor([0, 1, 6, 6, 50, 90], dtype=torch.int32))


@pytest.mark.parametrize("compressor", [LagRelative(), QueryRuns(3)], ids=["keys", "queries"])
@pytest.mark.parametrize("scale", [0.0, -0.3])
def test_any_scale(scale, compressor):
    assert_same(inputs(1, 2, 1, 60, 16), SMALL.replace(compressor=compressor), scale=scale)


def test_any_strides():
    tensors = [tensor.transpose(-1, -2).contiguous().transpose(-1, -2) for tensor in inputs(1, 2, 1, 60, 16)]
    assert_same(tensors, SMALL)
    assert_same(tensors, SMALL, attention=torch.compile(traced_attention, fullgraph=True, backend="aot_eager"))


def test_one_graph_serves_all_rules_and_packings():
    graphs = []

    def count(graph, _):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(traced_attention, fullgraph=True, backend=count)
    tensors = inputs(1, 2, 1, 50, 16)
    values = SMALL.replace(compressor=ValueRelative())
    for config in (
        SMALL,
        SMALL.replace(top_k=9),
        SMALL.replace(compressor=LagRelative(value_weight=0)),
        values,
        SMALL.replace(compressor=KeyDiff()),
        Rule(2, 12, 3, 20),
    ):
        assert_same(tensors, config, attention=compiled)
    assert len(graphs) == 1
    for boundaries in ([0, 50], [0, 10, 50], [0, 5, 10, 45, 50]):
        assert_same(tensors, SMALL, torch.tensor(boundaries, dtype=torch.int32), attention=compiled)
    # No boundaries, two of them, and any number.
    assert len(graphs) == 3


def test_fake_tensors_have_the_shapes_and_strides_of_real_ones():
    query, key, value, _ = inputs(1, 4, 2, 70, 16)
    leaves = [tensor.detach().requires_grad_() for tensor in (query, key, value)]
    boundaries = torch.tensor([0, 20, 70], dtype=torch.int32)
    # Not test_aot_dispatch_dynamic: behind the ranks their buffer is what the memory held, so two calls differ there.
    checks = "test_schema", "test_autograd_registration", "test_faketensor"
    operator = torch.ops.lrsa_lit.attention.default
    torch.library.opcheck(operator, (*leaves, tensor_of_rule(SMALL), boundaries, 0.25), test_utils=checks)


def test_a_rule_of_an_evaluation_trains():
    with torch.inference_mode():
        rule_tensor = tensor_of_rule(SMALL)
    assert not rule_tensor.is_inference()
    assert rule_tensor.tolist() == [4, 16, 4, 16, 1.0, 1.0]


def test_other_compressors_have_no_tensor():
    assert tensor_of_rule(SMALL.replace(compressor=RandomTokens())) is None


def test_boundaries_that_do_not_fit_are_refused():
    query, key, value, _ = inputs(1, 2, 1, 40, 16)
    boundaries = torch.tensor([0, 41], dtype=torch.int32)
    with refused("cu_seqlens"):
        traced_attention(query, key, value, tensor_of_rule(SMALL), cu_seqlens=boundaries, scale=0.25)


def fitting():
    return [tensor.detach() for tensor in inputs(1, 4, 2, 40, 16)[:3]]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda query, key, value: (query, key, value[..., :8]), "value"),
        (lambda query, key, value: (query[:, :3], key, value), "query"),
        (lambda query, key, value: (query, key, value.double()), "dtype"),
        (lambda query, key, value: (query[:, :, :5], key, value), "query"),
    ],
    ids=["head size", "heads", "dtype", "queries"],
)
def test_arguments_that_do_not_fit_are_refused(change, named):
    tensors = change(*fitting())
    torch._dynamo.reset()
    for run in (traced_attention, torch.compile(traced_attention, backend="eager")):
        with refused(named):
            run(*tensors, tensor_of_rule(SMALL), scale=0.25)


def test_rows_of_a_batch_cannot_be_packed():
    tensors = [tensor.expand(2, -1, -1, -1) for tensor in fitting()]
    with refused("cu_seqlens"):
        traced_attention(
            *tensors, tensor_of_rule(SMALL), cu_seqlens=torch.tensor([0, 40], dtype=torch.int32), scale=0.25
        )
