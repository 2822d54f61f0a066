"""How the kernels are judged: against eager PyTorch in float64, by its error in the same dtype.

Dimensions: B batch, H key-value heads, Hq query heads, T tokens, D head_dim.
"""

from __future__ import annotations

import torch

from lrsa_lit.ops.sparse_attention import Rule, Selection, Selector, bare_keys, eager
from lrsa_lit.ops.sparse_attention.triton import launch as kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FACTOR = 1.5
"""How many times the error of eager PyTorch in the same dtype the kernels may err."""
CAP = {torch.float32: 5e-6, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}
"""What the relative error (in the root mean square) may be at most."""
NAMES = ("output", "query gradient", "key gradient", "value gradient")


def inputs(batch, query_heads, heads, length, dim, dtype=torch.float32, seed=0, queries=None):
    """Query, key, value as Hugging Face passes them, (B, heads, T, D) views of (B, T, heads, D), and a gradient."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (queries or length, query_heads), (length, heads), (length, heads), (queries or length, query_heads)
    tensors = [torch.randn(batch, *shape, dim, generator=generator) for shape in shapes]
    return [tensor.to(DEVICE, dtype).transpose(1, 2) for tensor in tensors]


def run(forward, tensors, config, boundaries, selection, dtype):
    """Output and gradients of one implementation."""
    query, key, value, gradient = tensors
    leaves = [tensor.detach().to(dtype).requires_grad_() for tensor in (query, key, value)]
    scale = query.shape[-1] ** -0.5
    output = forward(*leaves, config, boundaries=boundaries, scale=scale, selection=selection)
    return [output.detach(), *torch.autograd.grad(output, leaves, gradient.to(dtype))]


def given_selection(tensors, config, boundaries) -> Selection | None:
    """One selection for all implementations: a flipped index would hide every other error."""
    if not isinstance(config.compressor, Selector):
        return None
    return eager.select(tensors[1], tensors[2], config, boundaries, tensors[0])


def assert_as_exact_as_eager(tensors, config: Rule, boundaries=None, capped=True):
    """Output, dQ, dK and dV of the kernels err at most FACTOR times what eager PyTorch does, and under CAP."""
    dtype = tensors[1].dtype
    boundaries = boundaries or (0, tensors[1].shape[2])
    chosen = given_selection(tensors, config, boundaries)
    tensors = [tensors[0], bare_keys(*tensors[1:3], config.compressor), *tensors[2:]]
    exact = run(eager.forward, tensors, config, boundaries, chosen, torch.float64)
    theirs = run(eager.forward, tensors, config, boundaries, chosen, dtype)
    ours = run(kernels.forward, tensors, config, boundaries, chosen, dtype)
    for name, truth, allowed, got in zip(NAMES, exact, theirs, ours, strict=True):
        assert got.isfinite().all(), f"{name}: not finite"
        size, error, eager_error = truth.square().mean().sqrt(), _rms(got, truth), _rms(allowed, truth)
        if size < 1e-9:
            # Where dQ or dK is zero in truth, each implementation leaves its own rounding error.
            assert error <= FACTOR * eager_error + 1e-5, f"{name}: {error:.2e} instead of zero"
            continue
        assert error <= FACTOR * eager_error + 1e-9, f"{name}: error {error:.2e}, eager has {eager_error:.2e}"
        if capped:
            assert error <= CAP[dtype] * size, f"{name}: relative error {error / size:.2e}"


def _rms(tensor, truth):
    return (tensor.double() - truth).square().mean().sqrt()
