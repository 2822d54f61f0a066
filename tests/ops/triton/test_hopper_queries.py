"""The warp-specialised dQ against the plain one, on a Hopper GPU: ``make test-gpu``."""

import pytest
import torch
from ops.triton.test_hopper import CASES, RULE, tensors

from lrsa_lit.ops.sparse_attention.impl.triton import plan
from lrsa_lit.ops.sparse_attention.impl.triton.plan import Geometry

pytestmark = pytest.mark.gpu


def inputs(geometry, query_heads, heads, dtype, batch=1, broken=None):
    """What the forward saves, and an output gradient as a view; all of NaN in the sequence ``broken``."""
    from lrsa_lit.ops.sparse_attention.impl.triton.forward import Saved, attend_forward

    arguments = tensors(geometry, query_heads, heads, dtype, batch)
    generator = torch.Generator("cuda").manual_seed(1)
    shape = batch, arguments[0].shape[2], query_heads, 128
    output_grad = torch.randn(shape, generator=generator, device="cuda", dtype=dtype).transpose(1, 2)
    if broken is not None:
        before, behind = (sum(plan.compact_rows(geometry)[:count]) for count in (broken, broken + 1))
        for tensor in (*arguments[:3], output_grad):
            tensor[:, :, slice(*geometry.boundaries[broken : broken + 2])] = float("nan")
        for tensor in arguments[3:]:
            tensor[:, :, before:behind] = float("nan")
    return Saved(*arguments, *attend_forward(*arguments, geometry, 0.1)), output_grad


def both(monkeypatch, saved, output_grad, geometry):
    """dQ and the row sums of output x gradient by the warp-specialised kernel, then by the plain one."""
    from lrsa_lit.ops.sparse_attention.impl.triton import query_gradient as module

    if not module._suits_hopper_queries(saved, output_grad):
        pytest.skip("not a Hopper GPU, or a Triton that the kernel was not checked with")
    results = module.query_gradient(saved, output_grad, geometry, 0.1)
    with monkeypatch.context() as patch:
        patch.setattr(module, "hopper_queries", None)
        return results, module.query_gradient(saved, output_grad, geometry, 0.1)


def assert_close(results, expected):
    (query_grad, delta), (plain, plain_delta) = results, expected
    error = torch.linalg.vector_norm(query_grad.double() - plain.double())
    assert error <= 1e-3 * torch.linalg.vector_norm(plain.double())
    torch.testing.assert_close(delta, plain_delta, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("lengths", "rule", "query_heads", "heads", "queries_from"), CASES)
def test_agrees_with_the_plain_gradient(monkeypatch, lengths, rule, query_heads, heads, queries_from, dtype):
    boundaries = tuple(sum(lengths[:count]) for count in range(len(lengths) + 1))
    geometry = Geometry(boundaries, queries_from, 0, *rule)
    assert_close(*both(monkeypatch, *inputs(geometry, query_heads, heads, dtype, batch=2), geometry))


@pytest.mark.parametrize("broken", range(4))
def test_a_packed_sequence_does_not_see_a_broken_neighbour(monkeypatch, broken):
    geometry = Geometry((0, 60, 360, 1360, 1660), 0, 0, *RULE)
    whole = torch.ones(1660, dtype=torch.bool, device="cuda")
    whole[slice(*geometry.boundaries[broken : broken + 2])] = False
    results, expected = both(monkeypatch, *inputs(geometry, 4, 2, torch.bfloat16, broken=broken), geometry)
    assert_close([tensor[:, :, whole] for tensor in results], [tensor[:, :, whole] for tensor in expected])


def test_every_run_gives_the_same_bits(monkeypatch):
    geometry = Geometry((0, 4097), 0, 0, *RULE)
    saved, output_grad = inputs(geometry, 8, 2, torch.bfloat16)
    first, second = (both(monkeypatch, saved, output_grad, geometry)[0] for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
