"""The warp-specialised dK and dV of the compact buffer against the plain one, on a Hopper GPU: ``make test-gpu``."""

import pytest
import torch

from lrsa_lit.ops.sparse_attention.impl.triton import plan
from lrsa_lit.ops.sparse_attention.impl.triton.plan import Geometry

pytestmark = pytest.mark.gpu

RULE = 16, 128, 32, 128


def inputs(geometry, query_heads, heads, dtype, batch=1):
    """What the forward saves, and an output gradient; query and gradient as views, the compact buffer contiguous."""
    from lrsa_lit.ops.sparse_attention.impl.triton.forward import Saved, attend_forward

    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, 128, generator=generator, device="cuda", dtype=dtype)

    tokens, rows = geometry.boundaries[-1], sum(plan.compact_rows(geometry))
    queries = tokens - geometry.queries_from
    shapes = (queries, query_heads), (queries, query_heads), (tokens, heads), (tokens, heads)
    output_grad, *raw = (normal(batch, *shape).transpose(1, 2) for shape in shapes)
    tensors = [*raw, normal(batch, heads, rows), normal(batch, heads, rows)]
    return Saved(*tensors, *attend_forward(*tensors, geometry, 0.1)), output_grad


def both(monkeypatch, saved, output_grad, geometry):
    """dK and dV of the compact buffer by the warp-specialised kernel, then by the plain one."""
    from lrsa_lit.ops.sparse_attention.impl.triton import key_gradient
    from lrsa_lit.ops.sparse_attention.impl.triton.backward import attend_backward

    if saved.compact_key.numel() and key_gradient._hopper_tile(saved, output_grad) is None:
        pytest.skip("not a Hopper GPU, or a Triton that the kernel was not checked with")
    results = attend_backward(saved, output_grad, None, geometry, 0.1)[3:]
    with monkeypatch.context() as patch:
        patch.setattr(key_gradient, "hopper_keys", None)
        return results, attend_backward(saved, output_grad, None, geometry, 0.1)[3:]


def assert_close(results, expected):
    for result, plain in zip(results, expected, strict=True):
        error = torch.linalg.vector_norm(result.double() - plain.double())
        assert error <= 3e-3 * torch.linalg.vector_norm(plain.double())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("lengths", "rule", "query_heads", "heads", "queries_from"),
    [
        *(pytest.param([length], RULE, 4, 2, 0, id=f"T={length}") for length in (1, 272, 273, 1025, 4097)),
        *(pytest.param([1025], RULE, 2 * group, 2, 0, id=f"group of {group}") for group in (1, 3, 8)),
        pytest.param([3000], (16, 128, 32, 37), 4, 2, 0, id="C=37"),
        pytest.param([2500], (3, 24, 7, 50), 4, 2, 0, id="L=24"),
        pytest.param([2500], (0, 300, 299, 1), 4, 2, 0, id="C=1"),
        pytest.param([2000], (16, 128, 0, 128), 4, 2, 0, id="sinks alone"),
        pytest.param([2000], (0, 128, 0, 128), 4, 2, 0, id="no compact rows"),
        pytest.param([1, 5, 300, 4000], RULE, 4, 2, 0, id="packed"),
        pytest.param([300, 5, 1, 700, 64, 128, 129], (16, 64, 16, 64), 4, 2, 0, id="packed, L=64"),
        pytest.param([3000], RULE, 4, 2, 1777, id="fewer queries"),
        pytest.param([3000], RULE, 4, 2, 2999, id="one query"),
    ],
)
def test_agrees_with_the_plain_kernel(monkeypatch, lengths, rule, query_heads, heads, queries_from, dtype):
    boundaries = tuple(sum(lengths[:count]) for count in range(len(lengths) + 1))
    geometry = Geometry(boundaries, queries_from, 0, *rule)
    arguments = inputs(geometry, query_heads, heads, dtype, batch=2)
    assert_close(*both(monkeypatch, *arguments, geometry))


def test_heads_of_a_group_over_several_programs(monkeypatch):
    # 16 tiles of 4 heads of keys, fewer than the programs that keep a GPU busy.
    geometry = Geometry((0, 8192), 0, 0, *RULE)
    arguments = inputs(geometry, 16, 4, torch.bfloat16)
    assert_close(*both(monkeypatch, *arguments, geometry))


def test_a_packed_sequence_does_not_see_a_broken_neighbour(monkeypatch):
    geometry = Geometry((0, 300, 600, 1600, 1900), 0, 0, *RULE)
    saved, output_grad = inputs(geometry, 4, 2, torch.bfloat16)
    before, behind = (sum(plan.compact_rows(geometry)[:count]) for count in (2, 3))
    for tensor in (saved.query, saved.key, saved.value, saved.output, saved.denominator, output_grad):
        tensor[:, :, 600:1600] = float("nan")
    for tensor in (saved.compact_key, saved.compact_value):
        tensor[:, :, before:behind] = float("nan")
    results, expected = both(monkeypatch, saved, output_grad, geometry)
    whole = torch.cat([torch.arange(before), torch.arange(behind, saved.compact_key.shape[2])])
    assert_close([result[:, :, whole] for result in results], [plain[:, :, whole] for plain in expected])


def test_every_run_gives_the_same_bits(monkeypatch):
    geometry = Geometry((0, 4097), 0, 0, *RULE)
    arguments = inputs(geometry, 8, 2, torch.bfloat16)
    first, second = (both(monkeypatch, *arguments, geometry)[0] for _ in range(2))
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))
