"""Does the operator give what its definition says? Random configurations and odd inputs against a float64 oracle.

Run ``python benchmarks/fuzz_operator.py`` for 5,000 configurations of the eager implementation, or ``--impl triton
--cases 300`` for the kernels: on the GPU if there is one, otherwise under Triton's interpreter. A configuration follows
from its seed alone: ``--first SEED --cases 1`` runs it again. Three questions are asked of each:

- Are the tokens kept that the definition ranks highest? Differences are allowed where the scores of the K-th and the
  next token are closer than 1e-6 of their size, or of as much as float32 can tell apart (``TIE``).
- Are output and gradients right, given those tokens? They may err ``ROUNDINGS`` times as much as one rounding of the
  scores, weights and products can make of inputs of this size.
- With inputs that are not finite, or so large that scores of the attention mean nothing in this dtype: does it run, and
  keep K different tokens of each partition?

Prints what was tried and the failing seeds; exits with 1 if there are any.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import itertools
import os
import random
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import numpy as np
from helpers import boundaries, lag_relative_logs, lag_spread, mean_pool, oracle_attention, partitions_compressed

from lrsa_lit.attention import LRSAConfig
from lrsa_lit.ops.sparse_attention import (
    ChunkWise,
    LagRelative,
    LagRelativeTail,
    MeanPool,
    QueryAttention,
    QueryRuns,
    RandomTokens,
    Recency,
    Rule,
    Selector,
    Strided,
    ValueRelative,
    select,
    sparse_attention,
)

TIE = 1e-6
"""Relative distance of two scores under which either may be kept; times the spread of the tokens where that is above 1,
because a score is its exponential and float32 rounds the spread."""
ROUNDINGS = 32.0
"""How many roundings of the largest intermediate value an output or gradient may err."""
INPUTS = (
    *("normal", "scales", "constant", "jitter", "ties", "equal", "huge", "tiny"),
    *("shifted", "dominated", "zeros", "vast", "minute", "bad"),
)
UNCHECKED = "vast", "minute", "bad"
"""Inputs of which the values of output and gradients are not compared."""
COMPRESSORS = (
    *[LagRelative()] * 6,
    *[ValueRelative()] * 2,
    *(ChunkWise(size, values) for size in (1, 2, 3) for values in (False, True)),
    *(RandomTokens(3), Recency(), Strided(), MeanPool(), LagRelativeTail(0.4)),
    *(QueryAttention(2), QueryAttention(1, kernel=3), QueryRuns(2, size=3)),
)
LOWEST = -80.0
"""Logarithm of the score under which tokens may be kept in any order, as float32 has no such probabilities."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One configuration.

    Attributes:
        seed: what all else follows from.
        rule: of the operator.
        lengths: of the packed sequences; of the only one if there are no more.
        packed: whether boundaries are passed.
        sizes: B, Hq, H and D.
        queries: Tq.
        dtype: of the tensors.
        scale: of the scores; None for the default.
        kind: of the inputs, one of ``INPUTS``.
    """

    seed: int
    rule: Rule
    lengths: tuple[int, ...]
    packed: bool
    sizes: tuple[int, int, int, int]
    queries: int
    dtype: torch.dtype
    scale: float | None
    kind: str


def main(args: list[str] | None = None) -> int:
    """Run the cases, print the counts, return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=5000)
    parser.add_argument("--first", type=int, default=0, help="seed of the first case")
    parser.add_argument("--impl", choices=["eager", "triton"], default="eager")
    options = parser.parse_args(args)
    torch.set_num_threads(1)
    counts: collections.Counter[str] = collections.Counter()
    failures: dict[int, str] = {}
    for seed in range(options.first, options.first + options.cases):
        case = drawn(seed, options.impl)
        try:
            problem = problem_of(case, options.impl, counts)
        except Exception as error:
            problem = f"{type(error).__name__}: {error}"
        counts[f"inputs: {case.kind}"] += 1
        counts[f"dtype: {str(case.dtype).removeprefix('torch.')}"] += 1
        counts[f"compressor: {type(case.rule.compressor).__name__}"] += 1
        if problem is not None:
            failures[seed] = problem
            print(f"seed {seed}: {problem}\n  {case}", flush=True)
    for name, count in sorted(counts.items()):
        print(f"{name:32} {count:7}")
    print(f"{options.impl}: {options.cases} configurations, {len(failures)} wrong {list(failures)}")
    return 1 if failures else 0


def drawn(seed: int, impl: str) -> Case:
    """The configuration of a seed; one that the kernels take if ``impl`` is theirs."""
    draw = random.Random(seed)
    kernels = impl == "triton"
    lag = draw.choice([2, 3, 4, 5, 8, 9, 16])
    rule = LRSAConfig(
        sink_size=draw.choice([0, 1, 2, 5, 9]),
        lag_size=lag,
        top_k=draw.randint(0, lag),
        chunk_size=draw.choice([None, None, 1, 2, draw.randint(1, 2 * lag + 1)]),
        value_weight=draw.choice([0.0, 1e-6, 0.3, 0.5, 1.0, 1.0, 2.0, 1e6, 1e20]),
        compressor=draw.choice(COMPRESSORS),
    ).rule
    packed = draw.random() < 0.3
    lengths = tuple(draw.randint(0, 45) for _ in range(draw.randint(1, 4))) if packed else (draw.randint(1, 70),)
    if not sum(lengths):
        lengths = (1,)
    heads, group = draw.randint(1, 2), draw.randint(1, 3)
    dim = draw.choice([16, 24, 64, 72] if kernels else [2, 3, 4, 5, 8, 16, 17])
    length, dtypes = sum(lengths), [torch.float32, torch.float32, torch.float16]
    if torch.cuda.is_available() or not kernels:
        dtypes.append(torch.bfloat16)
    if not kernels:
        dtypes += [torch.float64] * 3
    return Case(
        seed,
        rule,
        lengths,
        packed,
        (1 if packed else draw.randint(1, 2), heads * group, heads, dim),
        # The queries that a compressor scores by must be there.
        length if packed or draw.random() < 0.7 or rule.compressor.window else draw.randint(1, length),
        draw.choice(dtypes),
        draw.choice([None, None, None, 0.0, 0.05, 1.0]),
        draw.choice(INPUTS),
    )


def tensors_of(case: Case) -> list[Tensor]:
    """Query, key, value and the gradient of the output, on the CPU."""
    generator = torch.Generator().manual_seed(case.seed)
    batch, query_heads, heads, dim = case.sizes
    shapes = (
        (query_heads, case.queries),
        (heads, sum(case.lengths)),
        (heads, sum(case.lengths)),
        (query_heads, case.queries),
    )
    tensors = [torch.randn(batch, *shape, dim, generator=generator, dtype=torch.float64) for shape in shapes]
    for tensor in tensors[1:3]:
        _distort(tensor, case, random.Random(f"{case.seed}"))
    return [tensor.to(case.dtype) for tensor in tensors]


def _distort(tensor: Tensor, case: Case, draw: random.Random) -> None:
    """Make keys or values (B, H, T, D) of the case's kind, in place."""
    length, dim = tensor.shape[2:]
    half = case.dtype == torch.float16
    channel, tokens = draw.randrange(dim), [draw.randrange(length) for _ in range(1 + length // 12)]
    level = draw.choice([0.0, 1.0, -300.0])
    match case.kind:
        case "scales":
            tensor *= torch.logspace(-3, 2, dim, dtype=tensor.dtype)
        case "constant":
            tensor[..., channel] = level
        case "jitter":
            tensor[..., channel] = level + 1e-3 * tensor[..., channel]
        case "ties":
            tensor[:, :, tokens] = tensor[:, :, tokens[:1]]
        case "equal":
            tensor[:] = tensor[:, :, :1].clone()
        case "huge":
            tensor *= 30.0 if half else 1e4
        case "vast":
            tensor *= 1e3 if half else 1e15
        case "tiny":
            tensor /= 30.0 if half else 1e4
        case "minute":
            tensor /= 1e3 if half else 1e15
        case "shifted":
            tensor += draw.choice([10.0, -300.0])
        case "dominated":
            tensor[:, :, tokens] *= draw.choice([30.0, 300.0, 3e3])
        case "zeros":
            tensor[:, :, min(tokens) : max(tokens) + 1] = 0.0
        case "bad":
            tensor[:, :, tokens, channel] = draw.choice([float("nan"), float("inf"), -float("inf")])


def problem_of(case: Case, impl: str, counts: collections.Counter[str]) -> str | None:
    """What is wrong with the operator's results; None if nothing is."""
    tensors = tensors_of(case)
    device = "cuda" if impl == "triton" and torch.cuda.is_available() else "cpu"
    cuts = boundaries(case.lengths).to(device) if case.packed else None
    moved = [tensor.to(device) for tensor in tensors]
    selection = None
    if isinstance(case.rule.compressor, Selector):
        selection = select(*moved[1:3], case.rule, query=moved[0], cu_seqlens=cuts, impl=impl)
        problem = _wrong_selection(case, tensors, selection.indices.cpu(), counts)
        if problem is not None:
            return problem
    leaves = [tensor.requires_grad_() for tensor in moved[:3]]
    output = sparse_attention(*leaves, case.rule, cu_seqlens=cuts, scale=case.scale, impl=impl)
    results = [output, *torch.autograd.grad(output, leaves, moved[3])]
    if case.kind in UNCHECKED:
        return None
    compress = mean_pool if selection is None else _Kept(case, selection.indices.cpu())
    return _wrong_values(case, tensors, [result.detach().cpu() for result in results], compress, counts)


class _Kept:
    """The oracle's compressor that keeps what was selected; called head by head, sequence by sequence."""

    def __init__(self, case: Case, indices: Tensor) -> None:
        """From positions (B, H, P, K), which count from the row's start."""
        batch, query_heads, heads, _ = case.sizes
        rows = [indices[row, head // (query_heads // heads)] for row in range(batch) for head in range(query_heads)]
        starts = torch.tensor(_starts(case), dtype=torch.int64)
        self.places = [(row - starts[:, None])[p] for row in rows for p in range(len(starts))]
        self.calls = 0

    def __call__(self, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
        """(L, D) keys and values -> (K, D)."""
        kept = self.places[self.calls % len(self.places)]
        self.calls += 1
        return key[kept], value[kept]


def _starts(case: Case) -> list[int]:
    """First token of each partition, as they follow each other in a selection."""
    found, start = [], 0
    for length in case.lengths:
        count = partitions_compressed(length - 1, case.rule) if length else 0
        found += [start + case.rule.sink_size + p * case.rule.lag_size for p in range(count)]
        start += length
    return found


def _wrong_selection(
    case: Case, tensors: list[Tensor], indices: Tensor, counts: collections.Counter[str]
) -> str | None:
    batch, _, heads, _ = case.sizes
    starts, lag, keep = _starts(case), case.rule.lag_size, case.rule.top_k
    if indices.shape != (batch, heads, len(starts), keep):
        return f"selection: shape {tuple(indices.shape)}"
    for row, head, (p, start) in itertools.product(range(batch), range(heads), enumerate(starts)):
        kept = (indices[row, head, p] - start).tolist()
        if sorted(set(kept)) != kept or not all(0 <= place < lag for place in kept):
            return f"selection: row {row}, head {head}, partition {p} keeps {kept}"
        if case.kind == "bad" or isinstance(case.rule.compressor, RandomTokens) or not 0 < keep < lag:
            continue
        parts = [x[row, head, at : at + lag].double() for at in (start, start + lag) for x in tensors[1:3]]
        if window := case.rule.compressor.window:
            queries = tensors[0][row].unflatten(0, (heads, -1))[head, :, start + 2 * lag - window : start + 2 * lag]
            logs, rounding = _query_logs(parts[0], queries.flatten(0, 1).double(), case.rule)
        else:
            logs, rounding = _logs(parts, case.rule)
        counts["partitions ranked"] += 1
        best = np.sort(np.argsort(-logs, kind="stable")[:keep]).tolist()
        if kept == best:
            continue
        lost, won = sorted(set(best) - set(kept)), sorted(set(kept) - set(best))
        gap = logs[lost].max() - logs[won].min()
        if not gap <= TIE * max(1.0, rounding[lost + won].max()):
            return f"selection: row {row}, head {head}, partition {p} keeps {kept}, not {best}; {gap:.2e} apart"
        counts["partitions with another tie"] += 1
    return None


def _query_logs(key: Tensor, queries: Tensor, rule: Rule) -> tuple[np.ndarray, np.ndarray]:
    """:func:`_logs` of a compressor that scores keys (L, D) by queries (N, D): the products bound the rounding."""
    compressor, scale = rule.compressor, key.shape[-1] ** -0.5
    logits = (queries @ key.T).numpy().astype(np.longdouble) * scale
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    scores = (weights / weights.sum(axis=-1, keepdims=True)).mean(axis=0)
    side = compressor.kernel // 2
    padded = np.pad(scores, side)
    scores = sum(padded[place : place + rule.lag_size] for place in range(compressor.kernel)) / compressor.kernel
    if isinstance(compressor, QueryRuns):
        runs = np.arange(rule.lag_size) // compressor.size
        scores = np.array([scores[runs == run].mean() for run in runs])
    size = (queries.abs() @ key.abs().T).max().item() * scale
    return np.maximum(np.log(np.maximum(scores, 1e-300)), LOWEST), np.full(rule.lag_size, size)


def _logs(parts: list[Tensor], rule: Rule) -> tuple[np.ndarray, np.ndarray]:
    """Logarithms (L,) of the exact scores of a partition, and the spreads of its tokens, which bound their rounding."""
    compressor, places = rule.compressor, np.arange(rule.lag_size)
    if isinstance(compressor, Recency):
        return places.astype(float), np.zeros(rule.lag_size)
    if isinstance(compressor, Strided):
        chosen = [place * rule.lag_size // rule.top_k for place in range(rule.top_k)]
        return np.isin(places, chosen).astype(float), np.zeros(rule.lag_size)
    key, value, next_key, next_value = parts
    if isinstance(compressor, ValueRelative) or getattr(compressor, "values_only", False):
        key, next_key, rule = value, next_value, rule.replace(compressor=LagRelative(value_weight=0.0))
    logs = lag_relative_logs(key, value, next_key, next_value, rule)
    if isinstance(compressor, LagRelativeTail):
        logs[rule.lag_size - compressor.last(rule.top_k) :] = np.inf
    sources = [(key, next_key), (value, next_value)] if rule.compressor.value_weight else [(key, next_key)]
    spreads = np.max([lag_spread(*(x.numpy() for x in source)) for source in sources], axis=0)
    if isinstance(compressor, ChunkWise):
        runs = places // compressor.size
        highest, spreads = (np.array([of[runs == run].max() for run in runs]) for of in (logs, spreads))
        relative = np.exp(logs - highest)
        return highest + np.log([relative[runs == run].mean() for run in runs]), spreads
    return logs, spreads


def _wrong_values(
    case: Case, tensors: list[Tensor], results: list[Tensor], compress: Any, counts: collections.Counter[str]
) -> str | None:
    leaves = [tensor.detach().double().requires_grad_() for tensor in tensors[:3]]
    output = oracle_attention(*leaves, case.rule, lengths=case.lengths, scale=case.scale, compress=compress)
    gradients = torch.autograd.grad(output, leaves, tensors[3].double(), materialize_grads=True)
    sizes = _largest(case, tensors)
    if case.dtype == torch.float16 and max(truth.abs().max() for truth in (output, *gradients)) > 1e4:
        counts["values beyond float16"] += 1
        return None
    for name, result, truth, size in zip(
        ("output", "dq", "dk", "dv"), results, [output, *gradients], sizes, strict=True
    ):
        if result.dtype != case.dtype or result.shape != truth.shape:
            return f"{name}: {result.dtype} {tuple(result.shape)}"
        error = (result.double() - truth).abs().max().item()
        allowed = ROUNDINGS * torch.finfo(case.dtype).eps * size + 1e-25
        if not error <= allowed:
            return f"{name}: error {error:.2e} of {truth.abs().max().item():.2e}, allowed {allowed:.2e}"
    counts["outputs and gradients compared"] += 1
    return None


def _largest(case: Case, tensors: list[Tensor]) -> list[float]:
    """Bounds of the values on the way to output and gradients, times the scores, whose rounding they carry."""
    of_query, of_key, of_value, of_grad = (tensor.double().norm(dim=-1).max().item() for tensor in tensors)
    scale = case.sizes[3] ** -0.5 if case.scale is None else case.scale
    # The kernels take a scale of 0 for a very small one.
    scale = max(scale, 1e-25)
    scores = 1 + scale * of_query * of_key
    rows = case.queries * case.sizes[1] // case.sizes[2]
    product = scale * of_grad * of_value
    return [scores * size for size in (of_value, product * of_key, product * of_query * rows, of_grad * rows)]


if __name__ == "__main__":
    sys.exit(main())
