"""Torch's fused attention without cuDNN, whose plans depend on the shape."""

import ast
from pathlib import Path

import pytest
import torch

import lrsa_lit
from lrsa_lit.ops import sdpa as module
from lrsa_lit.ops.sdpa import sdpa

NAME = "scaled_dot_product_attention"


@pytest.mark.parametrize("masked", [False, True])
def test_it_is_attention_with_its_gradient(masked):
    torch.manual_seed(0)
    query, key, value = (
        torch.randn(2, heads, tokens, 8, dtype=torch.float64, requires_grad=True)
        for heads, tokens in ((6, 5), (3, 7), (3, 7))
    )
    mask = torch.ones(5, 7, dtype=torch.bool).tril(2) if masked else None
    repeated = [part.repeat_interleave(2, dim=1) for part in (key, value)]
    scores = query @ repeated[0].mT * 0.3
    expected = (scores if mask is None else scores.masked_fill(~mask, float("-inf"))).softmax(-1) @ repeated[1]
    found = sdpa(query, key, value, mask=mask, scale=0.3, enable_gqa=True)
    torch.testing.assert_close(found, expected)
    grads = [torch.autograd.grad(output.sin().sum(), (query, key, value)) for output in (found, expected)]
    torch.testing.assert_close(*grads)


def test_cudnn_is_off_inside_only(monkeypatch):
    states = []

    def recorded(*arguments, **options):
        states.append(torch.backends.cuda.cudnn_sdp_enabled())
        return torch.nn.functional.scaled_dot_product_attention(*arguments, **options)

    monkeypatch.setattr(module, NAME, recorded)
    before = torch.backends.cuda.cudnn_sdp_enabled()
    sdpa(*(torch.ones(1, 1, 2, 4) for _ in range(3)))
    assert states == [False]
    assert torch.backends.cuda.cudnn_sdp_enabled() is before is True


def test_no_other_module_calls_torchs_attention_itself():
    root = Path(lrsa_lit.__file__).parent
    calls = {
        path.relative_to(root).as_posix()
        for path in root.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] == NAME
    }
    assert calls == {"ops/sdpa.py"}
