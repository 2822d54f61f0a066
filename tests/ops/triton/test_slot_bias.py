"""Biases of slots in the kernels, which know nothing of them."""

import itertools

import pytest
import torch
from helpers import refused
from ops.triton.oracle import CAP, DEVICE, NAMES, inputs

from lrsa_lit.ops.sparse_attention import Centroids, KeyValueStream, Rule, sparse_attention

RULE = Rule(3, 16, 4, compressor=Centroids(2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_clusters_weigh_in_the_kernels_as_in_eager_pytorch(dtype):
    *tensors, gradient = inputs(1, 2, 1, 58, 16, dtype)
    found = []
    for precision, impl in ((torch.float64, "eager"), (dtype, "triton")):
        leaves = [tensor.detach().to(precision).requires_grad_() for tensor in tensors]
        output = sparse_attention(*leaves, RULE, impl=impl)
        found.append([output, *torch.autograd.grad(output, leaves, gradient.to(precision))])
    for name, exact, ours in zip(NAMES, *found, strict=True):
        error = (ours.double() - exact).square().mean().sqrt()
        assert error <= CAP[dtype] * exact.square().mean().sqrt(), name


def test_packed_sequences_are_clustered_in_one_call():
    *tensors, _ = inputs(1, 2, 1, 100, 16)
    packed = {"cu_seqlens": torch.tensor([0, 58, 60, 100])}
    ours = sparse_attention(*tensors, RULE, impl="triton", **packed)
    expected = sparse_attention(*(x.double() for x in tensors), RULE, impl="eager", **packed)
    torch.testing.assert_close(ours.double(), expected, rtol=0, atol=1e-4)


def test_a_stream_keeps_the_biases():
    *tensors, _ = inputs(1, 2, 1, 58, 16)
    stream = KeyValueStream(RULE, "triton")
    parts = [
        stream.attend(*(x[:, :, start:stop] for x in tensors), 0.25)
        for start, stop in itertools.pairwise([0, 30, 51, 52, 58])
    ]
    expected = sparse_attention(*(x.double() for x in tensors), RULE, impl="eager")
    torch.testing.assert_close(torch.cat(parts, dim=2).double(), expected, rtol=0, atol=1e-4)


def test_the_largest_head_size_has_no_room_for_them():
    tensors = [torch.randn(1, 1, 60, 256, device=DEVICE) for _ in range(3)]
    with refused("head size", 264, "from 16 to 256"):
        sparse_attention(*tensors, RULE, impl="triton")
