"""How long do selectors with kernels take to choose (scores, the K highest, their ranks), next to ``LagRelative``?

    python benchmarks/selection.py [--tokens 131072] [--rules 128/32] [--shapes 32/8/128] [--selectors NAME …]

A gate comes first: the kernels keep what eager PyTorch keeps. Writes ``results/selection.json``; rows that it has from
the same commit, device and versions are not measured again, and none is begun after ``--seconds``. Exits with 1 if the
gate is red, or a row fails, or a selector takes more than twice the time of ``LagRelative``. ``--device cpu`` tries it
at small sizes, with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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

KEYS = "shape", "rule", "tokens", "selector"
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
    started, options = time.perf_counter(), _parse(args)
    green = _gate(options)
    print(f"correctness gate: {'green' if green else 'RED'}")
    if not green:
        return 1
    record = Record(options.out / "selection.json", about(device=options.device), KEYS)
    names = dict.fromkeys(["LagRelative", *options.selectors])
    wanted = [
        (dict(zip(KEYS, key, strict=True)), functools.partial(_measured, *key, options))
        for key in itertools.product(options.shapes, options.rules, options.tokens, names)
    ]
    for row in record.measure(wanted, started + options.seconds):
        print(*row.values(), flush=True)
    slow = list(_slow(record.rows))
    for row, times in slow:
        print(f"MISSED: {row['selector']} takes {times:.2f}x the time of LagRelative, {row['shape']}, {row['tokens']}")
    return int(bool(slow) or any("skipped" in row for row in record.rows))


def _parse(args: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[131072])
    parser.add_argument("--rules", nargs="+", default=["128/32"], help="L/K")
    parser.add_argument("--shapes", nargs="+", default=["32/8/128"], help="Hq/H/D")
    parser.add_argument("--selectors", nargs="+", choices=SELECTORS, default=list(SELECTORS))
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=140, help="begin no row after so many")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--out", type=Path, default=RESULTS)
    return parser.parse_args(args)


def _measured(shape: str, rule: str, tokens: int, name: str, options: argparse.Namespace) -> dict[str, float]:
    tensors = inputs(*map(int, shape.split("/")), tokens, device=options.device)
    lag, keep = map(int, rule.split("/"))
    config = Rule(16, lag, keep, compressor=SELECTORS[name])
    run = functools.partial(select_only, tensors, config)
    return {"ms": median(run, options.repeats, graphed=options.device == "cuda")}


def _slow(rows: list[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], float]]:
    """Rows beyond the bar, and how many times the time of ``LagRelative`` they take."""
    ms = {tuple(row[name] for name in KEYS): row["ms"] for row in rows if "ms" in row}
    for row in rows:
        base = ms.get((row["shape"], row["rule"], row["tokens"], "LagRelative"))
        if base and row.get("ms", 0.0) > BAR * base:
            yield row, row["ms"] / base


def select_only(tensors: list[Tensor], config: Rule) -> None:
    """The fused selection without the list of indices that ``select`` makes for people."""
    from lrsa_lit.ops.sparse_attention.kernel_code import kernel_code
    from lrsa_lit.ops.sparse_attention.triton.fused_selection import fused_ranks
    from lrsa_lit.ops.sparse_attention.triton.work_tables import Geometry

    code = kernel_code(config.compressor, config.top_k)
    assert code is not None
    with torch.no_grad():
        fused_ranks(code, *tensors[:3], Geometry.of(config, (0, tensors[1].shape[2])))


def _gate(options: argparse.Namespace) -> bool:
    """The kernels keep what eager PyTorch keeps, but for one partition in 500: scores can tie up to rounding."""
    shape, lag = ((32, 8, 128, 16384), 128) if options.device == "cuda" else ((4, 2, 16, 700), 64)
    query, key, value, _ = inputs(*shape, device=options.device)
    green = True
    for name in options.selectors:
        config = Rule(16, lag, lag // 4, compressor=SELECTORS[name])
        ours, exact = (select(key, value, config, query=query, impl=impl).indices for impl in ("triton", "eager"))
        flipped = (ours != exact).any(dim=-1).float().mean().item()
        print(f"{name}: {flipped:.2%} of the partitions keep other tokens than in eager PyTorch", flush=True)
        green &= flipped <= 0.002
    return green


if __name__ == "__main__":
    sys.exit(main())
