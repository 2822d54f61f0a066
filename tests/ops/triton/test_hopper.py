"""The warp-specialised forward against the plain one, on a Hopper GPU: ``make test-gpu``."""

import pytest
import torch

from lrsa_lit.ops.sparse_attention.impl.triton import plan
from lrsa_lit.ops.sparse_attention.impl.triton.plan import Geometry

pytestmark = pytest.mark.gpu

RULE = 16, 128, 32, 128
LENGTHS = [[1], [17], [271], [272], [273], [1025], [4097]]
CASES = [
    *(pytest.param(lengths, RULE, 4, 2, 0, id=f"T={lengths[0]}") for lengths in LENGTHS),
    *(pytest.param([1025], RULE, 2 * group, 2, 0, id=f"group of {group}") for group in (1, 3, 4, 8)),
    pytest.param([3000], (16, 128, 32, 37), 4, 2, 0, id="C=37"),
    pytest.param([2500], (3, 24, 7, 50), 4, 2, 0, id="L=24"),
    pytest.param([2500], (0, 300, 299, 1), 4, 2, 0, id="C=1"),
    pytest.param([2000], (0, 128, 0, 128), 4, 2, 0, id="no compact rows"),
    pytest.param([1, 5, 300, 4000], RULE, 4, 2, 0, id="packed"),
    pytest.param([300, 5, 1, 700, 64, 128, 129], (16, 64, 16, 64), 4, 2, 0, id="packed, L=64"),
    pytest.param([3000], RULE, 4, 2, 1777, id="fewer queries"),
    pytest.param([3000], RULE, 4, 2, 2999, id="one query"),
]
"""Lengths of the sequences, rule, query heads, heads, position of the first query."""


def tensors(geometry, query_heads, heads, dtype, batch=1):
    """Query, key, value as views, and a contiguous compact buffer."""
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, 128, generator=generator, device="cuda", dtype=dtype)

    tokens, rows = geometry.boundaries[-1], sum(plan.compact_rows(geometry))
    shapes = (tokens - geometry.queries_from, query_heads), (tokens, heads), (tokens, heads)
    raw = [normal(batch, *shape).transpose(1, 2) for shape in shapes]
    return [*raw, normal(batch, heads, rows), normal(batch, heads, rows)]


def both(monkeypatch, arguments, geometry):
    """Output and denominator of the warp-specialised forward, then of the plain one."""
    from lrsa_lit.ops.sparse_attention.impl.triton.forward import _suits_hopper, attend_forward

    if not _suits_hopper(*arguments):
        pytest.skip("not a Hopper GPU, or a Triton that the kernel was not checked with")
    results = attend_forward(*arguments, geometry, 0.1)
    with monkeypatch.context() as patch:
        patch.setitem(attend_forward.__globals__, "hopper", None)
        return results, attend_forward(*arguments, geometry, 0.1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("lengths", "rule", "query_heads", "heads", "queries_from"), CASES)
def test_agrees_with_the_plain_forward(monkeypatch, lengths, rule, query_heads, heads, queries_from, dtype):
    boundaries = tuple(sum(lengths[:count]) for count in range(len(lengths) + 1))
    geometry = Geometry(boundaries, queries_from, 0, *rule)
    arguments = tensors(geometry, query_heads, heads, dtype, batch=2)
    (output, denominator), (plain, expected) = both(monkeypatch, arguments, geometry)
    torch.testing.assert_close(output, plain, rtol=0, atol=2e-2 if dtype == torch.bfloat16 else 3e-3)
    torch.testing.assert_close(denominator, expected, rtol=2e-5, atol=2e-5)


def test_a_packed_sequence_does_not_see_a_broken_neighbour(monkeypatch):
    geometry = Geometry((0, 60, 360, 1360, 1660), 0, 0, *RULE)
    arguments = tensors(geometry, 4, 2, torch.bfloat16)
    before, behind = (sum(plan.compact_rows(geometry)[:count]) for count in (2, 3))
    for tensor in arguments[:3]:
        tensor[:, :, 360:1360] = float("nan")
    for tensor in arguments[3:]:
        tensor[:, :, before:behind] = float("nan")
    (output, _), (plain, _) = both(monkeypatch, arguments, geometry)
    whole = torch.cat([torch.arange(360), torch.arange(1360, 1660)])
    torch.testing.assert_close(output[:, :, whole], plain[:, :, whole], rtol=0, atol=2e-2)


def test_every_run_gives_the_same_bits(monkeypatch):
    geometry = Geometry((0, 4097), 0, 0, *RULE)
    arguments = tensors(geometry, 8, 2, torch.bfloat16)
    first, second = (both(monkeypatch, arguments, geometry)[0] for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
