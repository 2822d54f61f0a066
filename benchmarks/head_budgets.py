"""Time of attention whose heads differ in K, against that of equal heads with the same pairs, on a GPU in bfloat16.

    python benchmarks/head_budgets.py [--tokens 8192 32768 131072] [--shape 32/8/128] [--rule 128/32]

For each length: forward, and forward + backward, of the Triton kernels, selection included, as CUDA graphs up to 32k
tokens; and one step of decoding behind so many tokens, writing of the new pair included, as a CUDA graph. Budgets are
``halves`` (one half of the heads 2K, the other 0), ``apart`` (the same, in turn, so that groups are copied), ``duo``
(a share K/L of the heads dense, the others 0) and ``four`` (four different K). Their mean is K, so they attend to as
many pairs as ``equal``. Writes ``results/head_budgets.json``; rows that it has from the same commit, device and
versions are not measured again, and none is begun after ``--seconds``.

A correctness gate comes first: outputs and gradients err no more than 1.5x what eager PyTorch does in bfloat16, against
float64. Exits with 1 if the gate is red, if a row fails, or if at the longest length the forward pass, or both passes,
take more than 1.05x of what equal heads take. A step of decoding has no bar: each group launches kernels of its own.
``--device cpu`` tries it at small sizes, with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from records import RESULTS, MissingError, Record, about
from timing import GRAPHED, inputs, median, times

from lrsa_lit.attention.decoding.step_memory import FilledLengths, GroupedMemory, LayerMemory, Places
from lrsa_lit.ops.sparse_attention import GroupedStream, HeadRules, KeyValueStream, RandomTokens, Rule, sparse_attention

BAR = 1.05
Rules = Rule | HeadRules
Row = dict[str, Any]


def budgets(heads: int, lag: int, kept: int) -> dict[str, tuple[int, ...]]:
    """K of each head, by name; each has the mean K, if H is a multiple of 4 and H K of L."""
    step = kept // 4
    named = {
        "halves": [2 * kept] * (heads // 2) + [0] * (heads // 2),
        "apart": [2 * kept, 0] * (heads // 2),
        "duo": [lag] * (heads * kept // lag) + [0] * (heads - heads * kept // lag),
        "four": [
            top_k for top_k in (kept - 3 * step, kept - step, kept + step, kept + 3 * step) for _ in range(heads // 4)
        ],
    }
    return {name: tuple(each) for name, each in named.items() if sum(each) == heads * kept and max(each) <= lag}


def gate(rules: Sequence[HeadRules], shape: Sequence[int], device: str) -> bool:
    """Outputs and gradients of 16 partitions, at random: scores may keep other tokens in other dtypes."""
    *tensors, gradient = inputs(*shape, 16 * rules[0].common.lag_size + 1, device=device)
    for each in rules:
        rule, results = HeadRules(each.common.replace(compressor=RandomTokens()), each.top_k), []
        for impl, dtype in (("eager", torch.float64), ("eager", tensors[0].dtype), ("triton", tensors[0].dtype)):
            leaves = [tensor.to(dtype).requires_grad_() for tensor in tensors]
            output = sparse_attention(*leaves, rule, impl=impl)
            results.append([output, *torch.autograd.grad(output, leaves, gradient.to(dtype))])
        for truth, eager, got in zip(*results, strict=True):
            if not bool((got - truth).norm() <= 1.5 * (eager - truth).norm()):
                return False
    return True


@torch.no_grad()
def decoding(rule: Rules, shape: Sequence[int], tokens: int, device: str) -> Callable[[], object]:
    """One step behind so many tokens, in a decoder's memory of a layer; it may be captured and run again and again."""
    query, key, value, _ = inputs(*shape, tokens, device=device)
    stream = GroupedStream.of(rule, "triton") if isinstance(rule, HeadRules) else KeyValueStream(rule, "triton")
    stream.attend(query, key, value, 0.1)
    memories = []
    for part in stream.parts:
        assert isinstance(part, KeyValueStream)
        ends = torch.tensor([part.buffer.length], device=device)
        filled = FilledLengths(ends)
        filled.include_new()
        memories.append(LayerMemory([part], part.buffer.length + 256, filled, Places(torch.zeros_like(ends))))
    memory = GroupedMemory(rule.groups, iter(memories)) if isinstance(rule, HeadRules) else memories[0]
    new = query[:, :, -1:], key[:, :, -1:], value[:, :, -1:]
    return lambda: memory.attend(*new, 0.1)


def measured(rule: Rules, shape: Sequence[int], tokens: int, options: argparse.Namespace) -> dict[str, float]:
    """Milliseconds, and MiB."""
    on_gpu = options.device == "cuda"
    tensors = inputs(*shape, tokens, device=options.device)
    attend = functools.partial(sparse_attention, rule=rule, impl="triton")
    found = times(tensors, attend, repeats=options.repeats, graphed=on_gpu and tokens <= GRAPHED)
    decode = median(decoding(rule, shape, tokens, options.device), options.repeats, graphed=on_gpu)
    return {name: found[name] for name in ("forward", "both", "peak_mib") if name in found} | {"decode": decode}


def compared(record: Record, rule: Rules, shape: Sequence[int], tokens: int, options: argparse.Namespace) -> Row:
    """What is measured of a rule, and its ratios to equal heads at the same length."""
    found: Row = dict(measured(rule, shape, tokens, options))
    if isinstance(rule, HeadRules):
        equal = [row for row in record.rows if (row["tokens"], row["budgets"]) == (tokens, "equal")]
        if not equal or "skipped" in equal[0]:
            raise MissingError("equal heads were not measured")
        found |= {f"{kind}_ratio": found[kind] / equal[0][kind] for kind in ("forward", "both", "decode")}
    return found


def main(args: list[str] | None = None) -> int:
    """Gate, then times."""
    started, options = time.perf_counter(), _parse(args)
    shape = tuple(map(int, options.shape.split("/")))
    lag, kept = map(int, options.rule.split("/"))
    equal = Rule(16, lag, kept)
    ragged = {name: HeadRules(equal, each) for name, each in budgets(shape[1], lag, kept).items()}
    if not gate(list(ragged.values()), shape, options.device):
        print("correctness gate: RED")
        return 1
    facts = {**about(device=options.device), "repeats": options.repeats}
    record = Record(options.out / "head_budgets.json", facts, ("shape", "rule", "tokens", "budgets"))
    wanted = [
        (
            {"shape": options.shape, "rule": options.rule, "tokens": tokens, "budgets": name},
            functools.partial(compared, record, rule, shape, tokens, options),
        )
        for tokens, (name, rule) in itertools.product(sorted(options.tokens), {"equal": equal, **ragged}.items())
    ]
    for row in record.measure(wanted, started + options.seconds):
        print(
            *(f"{name} {value:.4g}" if isinstance(value, float) else value for name, value in row.items()), flush=True
        )
    longest = [row for row in record.rows if row["tokens"] == max(options.tokens)]
    worst = max((row[name] for row in longest for name in ("forward_ratio", "both_ratio") if name in row), default=0.0)
    print(f"at {max(options.tokens)} tokens at most {worst:.3f}x; the bar is {BAR}x")
    return int(worst > BAR or any("skipped" in row for row in record.rows))


def _parse(args: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 32768, 131072])
    parser.add_argument("--shape", default="32/8/128", help="Hq/H/D")
    parser.add_argument("--rule", default="128/32", help="L/K")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no row after so many")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--out", type=Path, default=RESULTS)
    return parser.parse_args(args)


if __name__ == "__main__":
    sys.exit(main())
