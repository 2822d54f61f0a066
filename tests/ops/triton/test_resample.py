"""The low frequencies of partitions by one kernel, against PyTorch in float64."""

import pytest
import torch
from ops.triton.oracle import CAP, inputs

from lrsa_lit.ops.sparse_attention import FreqPartition, Partitions, Rotary, Rule, sparse_attention
from lrsa_lit.ops.sparse_attention.triton import launch as kernels

ROTARIES = {
    "all": Rotary.plain(24, theta=50.0),
    "some": Rotary((0.9, 0.3, 0.05), 1.4),
    "none": Rotary(()),
}


@pytest.mark.parametrize(
    ("rotary", "lag", "kept", "dtype"),
    [
        ("all", 40, 17, torch.float32),
        ("some", 33, 1, torch.float16),
        ("none", 16, 16, torch.float32),
        ("some", 20, 9, torch.float32),
        ("all", 8, 0, torch.float16),
    ],
)
def test_pairs_and_gradients(rotary, lag, kept, dtype):
    _, key, value, _ = inputs(2, 4, 2, 3 * lag, 24, dtype)
    rotary = ROTARIES[rotary]
    rule = Rule(0, lag, kept, compressor=FreqPartition(), rotary=rotary)
    leaves, exact = ([x.detach().to(to).requires_grad_() for x in (key, value)] for to in (dtype, torch.float64))
    ours = kernels.compress(*leaves, rule, 2, 5)
    truth = rule.compressor.compress(
        Partitions(*[x[:, :, : 2 * lag].unflatten(2, (2, lag)) for x in exact] * 2, kept, 5, rotary=rotary)
    )
    for found, right in zip(ours, truth, strict=True):
        assert found.shape == (2, 2, 2 * kept, 24)
        assert found.dtype == dtype
        assert (found - right.flatten(2, 3)).norm() <= CAP[dtype] * right.norm()
    gradients = [
        torch.autograd.grad(sum((x.double() ** 2).sum() for x in pairs), given)
        for pairs, given in ((ours, leaves), (truth, exact))
    ]
    for found, right in zip(*gradients, strict=True):
        assert (found - right).norm() <= 2 * CAP[dtype] * right.norm()


def test_the_operator_runs_it():
    """With a gradient sequence by sequence, without one in one call."""
    *tensors, gradient = inputs(1, 2, 1, 45, 16)
    rule = Rule(2, 8, 3, compressor=FreqPartition(), rotary=Rotary.plain(16))
    found, packed = [], {"cu_seqlens": torch.tensor([0, 20, 45])}
    for impl in ("triton", "eager"):
        leaves = [x.detach().requires_grad_() for x in tensors]
        output = sparse_attention(*leaves, rule, impl=impl, **packed)
        with torch.no_grad():
            torch.testing.assert_close(sparse_attention(*leaves, rule, impl=impl, **packed), output)
        found.append([output, *torch.autograd.grad(output, leaves, gradient)])
    torch.testing.assert_close(*found, rtol=0, atol=1e-5)
