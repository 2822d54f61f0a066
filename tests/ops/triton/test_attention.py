"""The kernels on small shapes: on the CPU under the interpreter (float32, float16), on a GPU compiled."""

import pytest
import torch
from helpers import refused
from ops.triton.oracle import DEVICE, assert_as_exact_as_eager, given_selection, inputs, run

from lrsa_lit.ops.sparse_attention import MeanPool, Recency, Rule, eager, sparse_attention
from lrsa_lit.ops.sparse_attention.selection import compact_buffer
from lrsa_lit.ops.sparse_attention.triton import launch as kernels

SMALL = Rule(sink_size=4, lag_size=16, top_k=4)


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(SMALL, id="C=L"),
        pytest.param(SMALL.replace(chunk_size=24), id="C=1.5L"),
        pytest.param(SMALL.replace(chunk_size=32), id="C=2L"),
        pytest.param(SMALL.replace(chunk_size=5), id="C=5"),
        pytest.param(SMALL.replace(sink_size=0), id="S=0"),
        pytest.param(SMALL.replace(top_k=0), id="K=0"),
        pytest.param(SMALL.replace(top_k=16), id="K=L"),
        pytest.param(Rule(3, 7, 3), id="L=7"),
        pytest.param(Rule(3, 2, 1), id="L=2"),
    ],
)
def test_rule(config):
    assert_as_exact_as_eager(inputs(1, 2, 1, 101, 16), config)


@pytest.mark.parametrize("length", [1, 17, 35, 36, 37, 38, 69])
def test_length(length):
    assert_as_exact_as_eager(inputs(1, 2, 1, length, 16), SMALL)


@pytest.mark.parametrize(("query_heads", "heads"), [(1, 1), (3, 1), (4, 2), (8, 1)])
def test_grouped_heads(query_heads, heads):
    assert_as_exact_as_eager(inputs(2, query_heads, heads, 75, 16), SMALL)


@pytest.mark.parametrize("dim", [24, 64, 80])
def test_head_size(dim):
    assert_as_exact_as_eager(inputs(1, 2, 1, 60, dim), SMALL)


def test_float16_with_full_blocks():
    assert_as_exact_as_eager(inputs(1, 2, 1, 400, 16, torch.float16), Rule(16, 64, 24))


@pytest.mark.parametrize("compressor", [SMALL.compressor, MeanPool()], ids=["selector", "synthesizer"])
def test_packed(compressor):
    assert_as_exact_as_eager(inputs(1, 4, 2, 156, 16), SMALL.replace(compressor=compressor), (0, 1, 6, 76, 156))


def test_a_packed_sequence_does_not_see_a_broken_neighbour():
    query, key, value, _ = inputs(1, 2, 1, 120, 16)
    alone = sparse_attention(query[:, :, :60], key[:, :, :60], value[:, :, :60], SMALL, impl="triton")
    for tensor in (query, key, value):
        tensor[:, :, 60:] = float("nan")
    packed = sparse_attention(query, key, value, SMALL, cu_seqlens=torch.tensor([0, 60, 120]), impl="triton")
    torch.testing.assert_close(packed[:, :, :60], alone)


def test_fewer_queries_than_keys():
    assert_as_exact_as_eager(inputs(1, 2, 1, 90, 16, queries=23), SMALL)


def test_separate_buffers_of_a_stream():
    query, key, value, _ = inputs(1, 2, 1, 90, 16)
    start, dropped = 70, SMALL.sink_size + 2 * SMALL.lag_size
    compact = compact_buffer(key, value, SMALL)
    raw = key[:, :, dropped:], value[:, :, dropped:]
    options = {"scale": 0.25, "query_offset": start, "raw_offset": dropped}
    output = kernels.attend(query[:, :, start:], compact, raw, SMALL, **options)
    torch.testing.assert_close(output, eager.attend(query[:, :, start:], compact, raw, SMALL, **options))


@pytest.mark.parametrize("value", [0.0, -0.3, 5.0])
def test_any_scale(value):
    query, key, values, _ = inputs(1, 2, 1, 60, 16)
    chosen = given_selection((query, key, values), SMALL, (0, 60))
    results = [
        forward(query, key, values, SMALL, boundaries=(0, 60), scale=value, selection=chosen)
        for forward in (eager.forward, kernels.forward)
    ]
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)


def test_all_equal_keys():
    tensors = inputs(1, 2, 1, 101, 16)
    tensors[1][:] = tensors[1][:, :, :1].clone()
    assert_as_exact_as_eager(tensors, SMALL, capped=False)


def test_every_run_gives_the_same_bits():
    tensors = inputs(1, 4, 1, 130, 16)
    chosen = given_selection(tensors, SMALL, (0, 130))
    runs = [run(kernels.forward, tensors, SMALL, (0, 130), chosen, torch.float32) for _ in range(2)]
    assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))


def test_any_strides_of_inputs_and_gradient():
    query, key, value, _ = inputs(1, 2, 1, 60, 16)
    packed = torch.cat([query, key.expand(-1, 2, -1, -1), value.expand(-1, 2, -1, -1)], dim=-1)
    slices = packed.split(16, dim=-1)
    transposed = [part.transpose(-1, -2).contiguous().transpose(-1, -2) for part in slices]
    results = []
    for tensors in ([part.contiguous() for part in slices], slices, transposed):
        leaves = [tensor.detach().requires_grad_() for tensor in tensors]
        output = sparse_attention(*leaves, SMALL, impl="triton")
        # The gradient of a sum is one scalar with strides of zero.
        results.append([output, *torch.autograd.grad(output.sum(), leaves)])
    for result in results[1:]:
        for got, expected in zip(result, results[0], strict=True):
            torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite_do_not_crash(bad):
    query, key, value, _ = inputs(1, 2, 1, 101, 16)
    key[:, :, 40:60] = bad
    value[:, :, 30:50, 3] = bad
    assert sparse_attention(query, key, value, SMALL, impl="triton").shape == query.shape


def test_gradient_checkpointing():
    tensors = inputs(1, 2, 1, 75, 16)
    gradients = []
    for checkpointed in (False, True):
        leaves = [tensor.detach().requires_grad_() for tensor in tensors[:3]]
        call = lambda *args: sparse_attention(*args, SMALL, impl="triton")  # noqa: E731
        output = (
            torch.utils.checkpoint.checkpoint(call, *leaves, use_reentrant=False) if checkpointed else call(*leaves)
        )
        gradients.append(torch.autograd.grad(output, leaves, tensors[3]))
    assert all(torch.equal(first, second) for first, second in zip(*gradients, strict=True))


@pytest.mark.parametrize("compressor", [SMALL.compressor, Recency(), MeanPool()], ids=["scores", "selector", "pairs"])
def test_one_graph_under_torch_compile_or_a_break_for_another_compressor(compressor):
    tensors, config = inputs(1, 2, 1, 75, 16), SMALL.replace(compressor=compressor)
    call = lambda *args: sparse_attention(*args, config, impl="triton")  # noqa: E731
    results, whole = [], compressor == SMALL.compressor
    for function in (call, torch.compile(call, fullgraph=whole, backend="aot_eager")):
        leaves = [tensor.detach().requires_grad_() for tensor in tensors[:3]]
        output = function(*leaves)
        results.append([output, *torch.autograd.grad(output, leaves, tensors[3])])
    assert all(torch.equal(first, second) for first, second in zip(*results, strict=True))


def test_auto_runs_the_kernels_on_cuda(caplog):
    tensors = inputs(1, 2, 1, 40, 16)
    with caplog.at_level("INFO"):
        sparse_attention(*tensors[:3], SMALL)
    if DEVICE == "cuda":
        assert not [record for record in caplog.records if "impl=eager" in record.message]


@pytest.mark.parametrize(
    ("dtype", "dim", "field", "value"),
    [
        (torch.float64, 16, "dtype", torch.float64),
        (torch.float32, 20, "head size", 20),
        (torch.float32, 264, "head size", 264),
    ],
)
def test_unsupported_input_is_refused(dtype, dim, field, value):
    query = torch.zeros(1, 2, 9, dim, dtype=dtype, device=DEVICE)
    with refused(field, value):
        sparse_attention(query, query, query, SMALL, impl="triton")


def test_no_device_and_no_interpreter_is_refused(monkeypatch):
    monkeypatch.setattr(kernels.triton.knobs.runtime, "interpret", False)
    assert "TRITON_INTERPRET" in kernels.unsupported("cpu", torch.float32, 64).allowed
    monkeypatch.setattr(kernels.triton.knobs.runtime, "interpret", True)
    assert kernels.unsupported("cpu", torch.bfloat16, 64).value == torch.bfloat16
