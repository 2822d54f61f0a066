"""Time of attention whose heads differ in K, against that of equal heads with the same pairs, on a GPU in bfloat16.

    python benchmarks/head_budgets.py [--tokens 8192 32768 131072] [--shape 32/8/128] [--rule 128/32]

For each length: forward, and forward + backward, of the Triton kernels, selection included, as CUDA graphs up to 32k
tokens; and one step of decoding behind so many tokens, writing of the new pair included, as a CUDA graph. Budgets are
``halves`` (one half of the heads 2K, the other 0), ``apart`` (the same, in turn, so that groups are copied), ``duo``
(a share K/L of the heads dense, the others 0) and ``four`` (four different K). Their mean is K, so they attend to as
many pairs as ``equal``. Writes ``results/head_budgets.json``.

A correctness gate comes first: outputs and gradients err no more than 1.5x what eager PyTorch does in bfloat16, against
float64. Exits with 1 if the gate is red, or if at the longest length the forward pass, or both passes, take more than
1.05x of what equal heads take. A step of decoding has no bar: each group launches kernels of its own.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from records import RESULTS, about
from timing import GRAPHED, inputs, median, times

from lrsa_lit.attention.decoding.decoder import _FilledLengths, _GroupedMemory, _LayerMemory, _Places
from lrsa_lit.ops.sparse_attention import GroupedStream, HeadRules, KeyValueStream, RandomTokens, Rule, sparse_attention

BAR = 1.05
Rules = Rule | HeadRules


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


def gate(rules: Sequence[HeadRules], shape: Sequence[int]) -> bool:
    """Outputs and gradients at 2,049 tokens, at random: scores may keep other tokens in other dtypes."""
    *tensors, gradient = inputs(*shape, 2049)
    for each in rules:
        rule, results = HeadRules(each.common.replace(compressor=RandomTokens()), each.top_k), []
        for impl, dtype in (("eager", torch.float64), ("eager", torch.bfloat16), ("triton", torch.bfloat16)):
            leaves = [tensor.to(dtype).requires_grad_() for tensor in tensors]
            output = sparse_attention(*leaves, rule, impl=impl)
            results.append([output, *torch.autograd.grad(output, leaves, gradient.to(dtype))])
        for truth, eager, got in zip(*results, strict=True):
            if not bool((got - truth).norm() <= 1.5 * (eager - truth).norm()):
                return False
    return True


@torch.no_grad()
def decoding(rule: Rules, shape: Sequence[int], tokens: int) -> Callable[[], object]:
    """One step behind so many tokens, in a decoder's memory of a layer; it may be captured and run again and again."""
    query, key, value, _ = inputs(*shape, tokens)
    stream = GroupedStream.of(rule, "triton") if isinstance(rule, HeadRules) else KeyValueStream(rule, "triton")
    stream.attend(query, key, value, 0.1)
    memories = []
    for part in stream.parts:
        assert isinstance(part, KeyValueStream)
        ends = torch.tensor([part.buffer.length], device="cuda")
        filled = _FilledLengths(ends)
        filled.include_new()
        memories.append(_LayerMemory([part], part.buffer.length + 256, filled, _Places(torch.zeros_like(ends))))
    memory = _GroupedMemory(rule.groups, iter(memories)) if isinstance(rule, HeadRules) else memories[0]
    new = query[:, :, -1:], key[:, :, -1:], value[:, :, -1:]
    return lambda: memory.attend(*new, 0.1)


def measured(rule: Rules, shape: Sequence[int], tokens: int, repeats: int) -> dict[str, float]:
    """Milliseconds."""
    tensors = inputs(*shape, tokens)
    attend = functools.partial(sparse_attention, rule=rule, impl="triton")
    found = times(tensors, attend, repeats=repeats, graphed=tokens <= GRAPHED)
    decode = median(decoding(rule, shape, tokens), repeats, graphed=True)
    return {"forward": found["forward"], "both": found["both"], "decode": decode, "peak_mib": found["peak_mib"]}


def main() -> int:
    """Gate, then times."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 32768, 131072])
    parser.add_argument("--shape", default="32/8/128", help="Hq/H/D")
    parser.add_argument("--rule", default="128/32", help="L/K")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    shape = tuple(map(int, options.shape.split("/")))
    lag, kept = map(int, options.rule.split("/"))
    equal = Rule(16, lag, kept)
    ragged = {name: HeadRules(equal, each) for name, each in budgets(shape[1], lag, kept).items()}
    if not gate(list(ragged.values()), shape):
        print("correctness gate: RED")
        return 1
    more = {"dtype": "bfloat16", "shape": shape, "rule": options.rule}
    record: dict[str, Any] = {**about(), **more, "rows": []}
    worst = 0.0
    for tokens in sorted(options.tokens):
        base = measured(equal, shape, tokens, options.repeats)
        record["rows"].append({"tokens": tokens, "budgets": "equal", **base})
        print(f"{tokens} equal: " + ", ".join(f"{name} {value:.3f}" for name, value in base.items()), flush=True)
        for name, rule in ragged.items():
            found = measured(rule, shape, tokens, options.repeats)
            ratios = {f"{kind}_ratio": found[kind] / base[kind] for kind in ("forward", "both", "decode")}
            record["rows"].append({"tokens": tokens, "budgets": name, **found, **ratios})
            print(
                f"{tokens} {name}: " + ", ".join(f"{kind} {ratio:.3f}x" for kind, ratio in ratios.items()), flush=True
            )
            if tokens == max(options.tokens):
                worst = max(worst, ratios["forward_ratio"], ratios["both_ratio"])
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "head_budgets.json").write_text(json.dumps(record, indent=1) + "\n")
    print(f"at {max(options.tokens)} tokens at most {worst:.3f}x; the bar is {BAR}x")
    return int(worst > BAR)


if __name__ == "__main__":
    sys.exit(main())
