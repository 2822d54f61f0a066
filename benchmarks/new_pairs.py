"""Time of the compressors that make new pairs: all partitions of one layer on a GPU, in bfloat16, forward and backward.

    python benchmarks/new_pairs.py [--tokens 131072] [--heads 8] [--dim 128] [--rule 128/32]

A correctness gate comes first: FreqPartition's kernel errs no more than 1.5x what PyTorch does in bfloat16, against
float64. Prints milliseconds, and exits with 1 if the gate is red or FreqPartition's forward takes more than 1 ms.
"""

from __future__ import annotations

import argparse
import sys

import torch
import triton
from torch import Tensor

from lrsa_lit.ops.sparse_attention import Centroids, Compressor, FreqPartition, MeanPool, Rotary, Rule, implementation

BAR_MS = 1.0
COMPRESSORS = {"FreqPartition": FreqPartition(), "MeanPool": MeanPool(), "Centroids": Centroids()}


def compressed(compressor: Compressor, key: Tensor, value: Tensor, lag: int, kept: int, impl: str) -> Tensor:
    """Keys and values (2, 1, H, P K, D) of all partitions of one sequence (1, H, T, D) that have a reference."""
    rule = Rule(0, lag, kept, compressor=compressor, rotary=Rotary.plain(key.shape[-1]))
    return torch.stack(implementation(impl, key).compress(key, value, rule, key.shape[2] // lag - 1, 0))


def gate(heads: int, dim: int, lag: int, kept: int) -> bool:
    """Pairs and gradients of FreqPartition, on a few partitions."""
    tokens = [torch.randn(1, heads, 4 * lag, dim, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
    results = []
    for impl, dtype in (("eager", torch.float64), ("eager", torch.bfloat16), ("triton", torch.bfloat16)):
        leaves = [x.to(dtype).requires_grad_() for x in tokens]
        pairs = compressed(FreqPartition(), *leaves, lag, kept, impl)
        results.append([pairs, *torch.autograd.grad(pairs.double().square().sum(), leaves)])
    return all(
        bool((got - truth).norm() <= 1.5 * (eager - truth).norm()) for truth, eager, got in zip(*results, strict=True)
    )


def main() -> int:
    """Gate, then times."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=131072)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--rule", default="128/32", help="L/K")
    options = parser.parse_args()
    lag, kept = map(int, options.rule.split("/"))
    if not gate(options.heads, options.dim, lag, kept):
        print("correctness gate: RED")
        return 1
    shape = 1, options.tokens, options.heads, options.dim
    key, value = (torch.randn(shape, device="cuda", dtype=torch.bfloat16).transpose(1, 2) for _ in range(2))
    print(f"{torch.cuda.get_device_name()}, bfloat16, (B, T, H, D) = {shape}, L/K {options.rule}")
    times = {}
    for name, compressor in COMPRESSORS.items():
        # Biases of Centroids stand in channels of their own, for which there is room.
        leaves = [torch.nn.functional.pad(x, (0, 8 * compressor.has_bias)).requires_grad_() for x in (key, value)]

        def forward(compressor: Compressor = compressor, leaves: list[Tensor] = leaves) -> Tensor:
            return compressed(compressor, *leaves, lag, kept, "auto")

        with torch.no_grad():
            times[name] = triton.testing.do_bench(forward)
        both = triton.testing.do_bench(lambda: forward().sum().backward(), grad_to_none=leaves)
        print(f"{name}: forward {times[name]:.3f} ms, with the gradient {both:.3f} ms")
    return int(times["FreqPartition"] > BAR_MS)


if __name__ == "__main__":
    sys.exit(main())
