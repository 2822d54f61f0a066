"""What the benchmarks of attention share: cells, options, the correctness gate, and times of LRSA and of SDPA."""

from __future__ import annotations

import argparse
import contextlib
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from records import RESULTS
from timing import GRAPHED, Times, inputs, times
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from lrsa_lit.ops.sparse_attention import Rule, attended_pairs, select, sparse_attention
from lrsa_lit.ops.sparse_attention.gluon import hopper

LONG = 65536
"""Calls on more tokens take so long that three of them suffice."""


class Cell(NamedTuple):
    """What is timed: Hq/H/D:L/K:T."""

    query_heads: int
    heads: int
    dim: int
    lag: int
    keep: int
    tokens: int

    @classmethod
    def of(cls, text: str) -> Cell:
        return cls(*(int(number) for part in text.split(":") for number in part.split("/")))

    @property
    def rule(self) -> Rule:
        return Rule(16, self.lag, self.keep)

    @property
    def pair_share(self) -> float:
        """Pairs attended under the rule, as a share of those of dense causal attention."""
        return attended_pairs(self.tokens, self.rule) / attended_pairs(self.tokens, None)

    def inputs(self, device: str) -> list[Tensor]:
        return inputs(self.query_heads, self.heads, self.dim, self.tokens, device=device)

    def __str__(self) -> str:
        return "{}/{}/{} L={} K={} T={}".format(*self)


def parse(args: list[str] | None, about: str | None, cells: list[str], **more: Any) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", nargs="+", type=Cell.of, default=[*map(Cell.of, cells)], help="Hq/H/D:L/K:T")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=140, help="begin no cell after so many")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--out", type=Path, default=RESULTS)
    for name, options in more.items():
        parser.add_argument(f"--{name}", **options)
    return parser.parse_args(args)


def gate(options: argparse.Namespace) -> bool:
    """Output and gradients of the kernels err no more than 1.5x what eager PyTorch does, against float64.

    For each head size of the cells, the plain kernels and those for Hopper GPUs, which take only large calls otherwise.
    """
    for dim in sorted({cell.dim for cell in options.cells}):
        for enough in (1 << 62, 0) if dim == hopper.DIM and options.device == "cuda" else (1 << 62,):
            with mock.patch.object(hopper, "ENOUGH", enough):
                if not _is_exact(options.device, dim):
                    return False
    return True


def _is_exact(device: str, dim: int) -> bool:
    heads, length, config = ((8, 2), 2049, Rule(16, 128, 32)) if device == "cuda" else ((4, 2), 301, Rule(4, 32, 8))
    *tensors, gradient = inputs(*heads, dim, length, device=device)
    chosen = select(tensors[1], tensors[2], config, impl="eager")
    results = []
    for impl, dtype in (("eager", torch.float64), ("eager", tensors[0].dtype), ("triton", tensors[0].dtype)):
        leaves = [tensor.to(dtype).requires_grad_() for tensor in tensors]
        output = sparse_attention(*leaves, config, selection=chosen, impl=impl)
        results.append([output, *torch.autograd.grad(output, leaves, gradient.to(dtype))])
    errors = [((got - truth).norm(), (eager - truth).norm()) for truth, eager, got in zip(*results, strict=True)]
    return all(bool(got <= 1.5 * eager) for got, eager in errors)


def timed(cell: Cell, tensors: list[Tensor], attend: Callable[..., Tensor], repeats: int, *, graphed: bool) -> Times:
    """:func:`timing.times`, with fewer repeats for long calls, and graphs only for short ones."""
    graphed = graphed and cell.tokens <= GRAPHED and tensors[0].is_cuda
    return times(tensors, attend, repeats=3 if cell.tokens > LONG else repeats, graphed=graphed)


def lrsa(cell: Cell, tensors: list[Tensor], repeats: int) -> Times:
    """The operator, selection and gather included."""
    attend = functools.partial(sparse_attention, rule=cell.rule, impl="triton")
    return timed(cell, tensors, attend, repeats, graphed=True)


def dense(backend: SDPBackend, cell: Cell, repeats: int, device: str) -> Times:
    """Dense causal attention by a back end, in its fastest form: native grouped heads or repeated ones."""
    return _dense(backend, (cell.query_heads, cell.heads, cell.dim, cell.tokens), repeats, device)


@functools.cache
def _dense(backend: SDPBackend, shape: tuple[int, ...], repeats: int, device: str) -> Times:
    cell, tensors = Cell(*shape[:3], 2, 2, shape[3]), inputs(*shape, device=device)
    group, found = shape[0] // shape[1], []
    repeated = [tensors[0], *(part.repeat_interleave(group, dim=1) for part in tensors[1:3]), tensors[3]]
    for form in (tensors, repeated):
        grouped = form is tensors and group > 1

        def attend(query: Tensor, key: Tensor, value: Tensor, grouped: bool = grouped) -> Tensor:
            return scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=grouped)

        with sdpa_kernel(backend) if device == "cuda" else contextlib.nullcontext():
            found.append(timed(cell, form, attend, repeats, graphed=True))
    return {name: min(result[name] for result in found) for name in found[0]}


def against(ours: Times, cudnn: Times, share: float) -> dict[str, float]:
    """Speed-up over cuDNN and efficiency per pair, of forward and of both passes."""
    found = {}
    for name in ("forward", "both"):
        found[f"speedup_{name}"] = cudnn[name] / ours[name]
        found[f"efficiency_{name}"] = cudnn[name] * share / ours[name]
    return found
