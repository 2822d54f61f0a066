"""How long do selectors with kernels take to choose (scores, the K highest, their ranks), next to ``LagRelative``?

    python benchmarks/selection.py [--tokens 131072] [--rules 128/32] [--shapes 32/8/128] [--selectors NAME …]

A gate comes first: the kernels keep what eager PyTorch keeps. Writes ``results/selection.json``, and exits with 1 if
the gate is red or a selector takes more than twice the time of ``LagRelative``. Needs a CUDA device.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import sys
from pathlib import Path

import torch
from records import RESULTS, Record, about
from timing import inputs, median
from torch import Tensor

from lrsa_lit.ops.sparse_attention import (
    KeyDiff,
    LagRelative,
    LagRelativeTail,
    QueryAttention,
    QueryRuns,
    Rule,
    Selector,
    select,
)

BAR = 2.0
"""How many times what lag-relative selection takes any other may take."""
SELECTORS: dict[str, Selector] = {
    "LagRelative": LagRelative(),
    "LagRelativeTail": LagRelativeTail(),
    "KeyDiff": KeyDiff(),
    "QueryAttention": QueryAttention(),
    "QueryAttention-64": QueryAttention(window=64, kernel=5),
    "QueryRuns": QueryRuns(),
    "QueryRuns-64": QueryRuns(window=64, kernel=5, shared_heads=True),
}
"""With default settings, and with the window and the pooling that SnapKV takes."""


def main(args: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[131072])
    parser.add_argument("--rules", nargs="+", default=["128/32"], help="L/K")
    parser.add_argument("--shapes", nargs="+", default=["32/8/128"], help="Hq/H/D")
    parser.add_argument("--selectors", nargs="+", choices=SELECTORS, default=list(SELECTORS))
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(args)
    gate = _gate()
    print(f"correctness gate: {'green' if gate else 'RED'}")
    if not gate:
        return 1
    record = Record(options.out / "selection.json", about(), ("shape", "rule", "tokens"))
    missed = False
    for shape, rule, tokens in itertools.product(options.shapes, options.rules, options.tokens):
        tensors, ms = inputs(*map(int, shape.split("/")), tokens), {}
        lag, keep = map(int, rule.split("/"))
        for name in dict.fromkeys(["LagRelative", *options.selectors]):
            config = Rule(16, lag, keep, compressor=SELECTORS[name])
            ms[name] = median(functools.partial(select_only, tensors, config), options.repeats, graphed=True)
            ratio = ms[name] / ms["LagRelative"]
            missed |= ratio > BAR
            cell = f"{shape} L={lag} K={keep} T={tokens}"
            print(f"{cell:34} {name:17} {ms[name]:.3f} ms, {ratio:.2f}x", "" if ratio <= BAR else "MISSED", flush=True)
        record.add({"shape": shape, "rule": rule, "tokens": tokens, "ms": ms})
    return int(missed)


def select_only(tensors: list[Tensor], config: Rule) -> None:
    """The fused selection without the list of indices that ``select`` makes for people."""
    from lrsa_lit.ops.sparse_attention.kernel_code import kernel_code
    from lrsa_lit.ops.sparse_attention.triton.fused_selection import fused_ranks
    from lrsa_lit.ops.sparse_attention.triton.work_tables import Geometry

    code = kernel_code(config.compressor, config.top_k)
    assert code is not None
    with torch.no_grad():
        fused_ranks(code, *tensors[:3], Geometry.of(config, (0, tensors[1].shape[2])))


def _gate() -> bool:
    """The kernels keep what eager PyTorch keeps, but for one partition in 500: scores can tie up to rounding."""
    query, key, value, _ = inputs(32, 8, 128, 16384)
    for name, selector in SELECTORS.items():
        config = Rule(16, 128, 32, compressor=selector)
        ours, exact = (select(key, value, config, query=query, impl=impl).indices for impl in ("triton", "eager"))
        flipped = (ours != exact).any(dim=-1).float().mean().item()
        print(f"{name}: {flipped:.2%} of the partitions keep other tokens than in eager PyTorch")
        if flipped > 0.002:
            return False
    return True


if __name__ == "__main__":
    sys.exit(main())
