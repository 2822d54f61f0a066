"""The warp-specialised kernels against the plain ones and against eager PyTorch, on a Hopper GPU: ``make test-gpu``."""

import itertools

import pytest
import torch
from ops.triton.oracle import assert_as_exact_as_eager, inputs

from lrsa_lit.ops.sparse_attention import MeanPool, Rule
from lrsa_lit.ops.sparse_attention.gluon import hopper
from lrsa_lit.ops.sparse_attention.triton.forward_kernel import attend_forward
from lrsa_lit.ops.sparse_attention.triton.host_functions import Inputs, Saved
from lrsa_lit.ops.sparse_attention.triton.key_gradient_kernel import attend_backward
from lrsa_lit.ops.sparse_attention.triton.query_gradient_kernel import query_gradient
from lrsa_lit.ops.sparse_attention.triton.work_tables import Geometry, compact_rows

pytestmark = pytest.mark.gpu

RULE = 16, 128, 32, 128
CONFIG = Rule(sink_size=16, lag_size=128, top_k=32)
DTYPES = [torch.bfloat16, torch.float16]
LENGTHS = 1, 17, 271, 272, 273, 1025, 4097
CASES = [
    *(pytest.param([length], RULE, 4, 2, 0, id=f"T={length}") for length in LENGTHS),
    *(pytest.param([1025], RULE, 2 * group, 2, 0, id=f"group of {group}") for group in (1, 3, 4, 8)),
    # 16 tiles of 4 heads of keys: fewer than keep a GPU busy, so the heads of a group are spread over programs.
    pytest.param([8192], RULE, 16, 4, 0, id="few tiles"),
    pytest.param([3000], (16, 128, 32, 37), 4, 2, 0, id="C=37"),
    pytest.param([2500], (3, 24, 7, 50), 4, 2, 0, id="L=24"),
    pytest.param([2500], (0, 300, 299, 1), 4, 2, 0, id="C=1"),
    pytest.param([2000], (16, 128, 0, 128), 4, 2, 0, id="sinks alone"),
    pytest.param([2000], (0, 128, 0, 128), 4, 2, 0, id="no compact rows"),
    pytest.param([1, 5, 300, 4000], RULE, 4, 2, 0, id="packed"),
    pytest.param([300, 5, 1, 700, 64, 128, 129], (16, 64, 16, 64), 4, 2, 0, id="packed, L=64"),
    pytest.param([3000], RULE, 4, 2, 1777, id="fewer queries"),
    pytest.param([3000], RULE, 4, 2, 2999, id="one query"),
    pytest.param([300, 1, 700, 1025], RULE, 4, 2, (130, 0, 699, 0), id="packed, fewer queries of some"),
]
"""Lengths of the sequences, rule, query heads, heads, position of the first query (of each)."""
KERNELS = {
    "forward": lambda saved, output_grad, geometry: attend_forward(saved.inputs, geometry, 0.1),
    "queries": lambda saved, output_grad, geometry: query_gradient(saved, output_grad, geometry, 0.1),
    "keys": lambda saved, output_grad, geometry: attend_backward(saved, output_grad, None, geometry, 0.1)[3:],
}
"""Output and log-sum-exp; dQ and row sums of output x gradient; dK and dV of the compact buffer."""


@pytest.fixture(autouse=True)
def always(monkeypatch):
    """Small calls go to the Hopper kernels too."""
    if not hopper.CHECKED or torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("not a Hopper GPU, or a Triton that the kernels were not run with")
    monkeypatch.setattr(hopper, "ENOUGH", 0)


def plainly(run):
    """What the plain kernels give."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hopper, "ENOUGH", 1 << 62)
        return run()


def arguments(geometry, query_heads, heads, dtype, batch=1, broken=None):
    """What the forward saves, and a gradient, as views; NaN all over the sequence ``broken``."""
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, 128, generator=generator, device="cuda", dtype=dtype)

    tokens, rows = geometry.boundaries[-1], sum(compact_rows(geometry))
    queries = tokens - sum(geometry.first_queries)
    shapes = (queries, query_heads), (tokens, heads), (tokens, heads), (queries, query_heads)
    *raw, output_grad = (normal(batch, *shape).transpose(1, 2) for shape in shapes)
    compact = [normal(batch, heads, rows), normal(batch, heads, rows)]
    if broken is not None:
        for tensor in (*raw, output_grad):
            tensor[:, :, slice(*geometry.boundaries[broken : broken + 2])] = float("nan")
        for tensor in compact:
            tensor[:, :, rows_of(geometry, broken)] = float("nan")
    inputs = Inputs(*raw, *compact)
    return Saved(inputs, *plainly(lambda: attend_forward(inputs, geometry, 0.1))), output_grad


def rows_of(geometry, sequence):
    """Rows of the compact buffer that belong to a sequence."""
    return slice(*(sum(compact_rows(geometry)[:count]) for count in (sequence, sequence + 1)))


def both(kernel, saved, output_grad, geometry):
    """Results of the Hopper kernel, then of the plain one."""
    assert hopper.suits(*saved.inputs, output_grad)
    run = KERNELS[kernel]
    return run(saved, output_grad, geometry), plainly(lambda: run(saved, output_grad, geometry))


def assert_close(results, expected):
    for result, plain in zip(results, expected, strict=True):
        error = torch.linalg.vector_norm(result.double() - plain.double())
        assert error <= 4e-3 * torch.linalg.vector_norm(plain.double())


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("lengths", "rule", "query_heads", "heads", "queries_from"), CASES)
def test_agrees_with_the_plain_kernel(lengths, rule, query_heads, heads, queries_from, dtype, kernel):
    geometry = Geometry(*rule, (0, *itertools.accumulate(lengths)), queries_from)
    saved, output_grad = arguments(geometry, query_heads, heads, dtype, batch=2)
    results, expected = both(kernel, saved, output_grad, geometry)
    assert_close(results, expected)
    if kernel == "forward":
        torch.testing.assert_close(results[1], expected[1], rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("broken", range(4))
def test_a_packed_sequence_does_not_see_a_broken_neighbour(broken, kernel):
    geometry = Geometry(*RULE, (0, 300, 600, 1600, 1900))
    saved, output_grad = arguments(geometry, 4, 2, torch.bfloat16, broken=broken)
    sick = rows_of(geometry, broken) if kernel == "keys" else slice(*geometry.boundaries[broken : broken + 2])
    whole = torch.ones(saved.inputs.compact_key.shape[2] if kernel == "keys" else 1900, dtype=torch.bool, device="cuda")
    whole[sick] = False
    results, expected = both(kernel, saved, output_grad, geometry)
    assert_close([result[:, :, whole] for result in results], [plain[:, :, whole] for plain in expected])


@pytest.mark.parametrize("kernel", KERNELS)
def test_every_run_gives_the_same_bits(kernel):
    geometry = Geometry(*RULE, (0, 4097))
    saved, output_grad = arguments(geometry, 8, 2, torch.bfloat16)
    first, second = (KERNELS[kernel](saved, output_grad, geometry) for _ in range(2))
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))


def test_a_new_top_k_does_not_compile_again():
    kernels = [
        hopper.forward_pipeline._hopper_forward_kernel,
        hopper.query_gradient_pipeline._hopper_query_kernel,
        hopper.key_gradient_pipeline._hopper_key_kernel,
    ]
    compiled = []
    for keep in (32, 16, 1, 77):
        geometry = Geometry(16, 128, keep, 128, (0, 1025 + keep))
        saved, output_grad = arguments(geometry, 8, 2, torch.bfloat16)
        for run in KERNELS.values():
            run(saved, output_grad, geometry)
        compiled.append([len(kernel.kernel.device_caches[0][0]) for kernel in kernels])
    assert all(count == compiled[0] for count in compiled)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("group", [1, 3, 4, 8])
def test_as_exact_as_eager(group, dtype):
    assert_as_exact_as_eager(inputs(2, 2 * group, 2, 1025, 128, dtype), CONFIG)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("change", [{"chunk_size": 192}, {"chunk_size": 5}, {"compressor": MeanPool()}], ids=str)
def test_another_rule_is_as_exact_as_eager(change, dtype):
    assert_as_exact_as_eager(inputs(1, 4, 2, 1500, 128, dtype), CONFIG.replace(**change))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packed_rows_are_as_exact_as_eager(dtype):
    assert_as_exact_as_eager(inputs(1, 4, 2, 4306, 128, dtype), CONFIG, (0, 1, 6, 306, 4306))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("equal", [False, True], ids=["large", "equal"])
def test_unusual_keys_are_as_exact_as_eager(equal, dtype):
    tensors = inputs(1, 4, 2, 1025, 128, dtype)
    if equal:
        tensors[1][:] = tensors[1][:, :, :1].clone()
    else:
        tensors[1].mul_(1e4)
    assert_as_exact_as_eager(tensors, CONFIG, capped=False)
