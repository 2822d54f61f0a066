"""Is LRSA attention as fast as its share of query-key pairs allows?

Run ``python benchmarks/attention.py`` on a CUDA device.
Times the Triton kernels, selection and gather included, against dense cuDNN and FlashAttention (torch SDPA),
FlexAttention with the same rule, and eager PyTorch: forward, and forward + backward, medians in one process. Runs
a correctness gate first and prints no speed-up if it fails. Writes ``results/attention.json`` and ``attention.png``.

*Efficiency* = dense cuDNN time x (pairs attended / pairs of dense causal attention) / LRSA time: 1.0 means as good per
pair as cuDNN. Sizes up to 32k are timed as CUDA graphs, for LRSA and dense alike. ``queued`` is the time of forward +
backward without graphs, eight calls launched in a row as the layers of a model are; ``launched`` that of a single one.

``python benchmarks/attention.py --selectors --tokens 131072 --rules 128/32 --shapes 32/8/128`` times nothing but what
selectors with kernels choose (scores, the K highest, their ranks), writes ``results/selection.json``, and fails if one
of them takes more than twice the time of ``LagRelative``. Names behind ``--selectors`` are the ones to time.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import math
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from lrsa_lit.ops.sparse_attention import (
    KeyDiff,
    LagRelative,
    LagRelativeTail,
    QueryAttention,
    QueryRuns,
    Rule,
    Selector,
    attended_pairs,
    compressed_at,
    raw_start,
    select,
    sparse_attention,
)

RESULTS = Path(__file__).parent / "results"
GRAPHED = 32768
SHORT = 4096
_QUEUE = 8
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
Times = dict[str, float]


def main(args: list[str] | None = None) -> int:
    options = _parse(args)
    gate = _gate() if options.selectors is None else _selection_gate()
    print(f"correctness gate: {'green' if gate else 'RED'}")
    if not gate:
        return 1
    versions = {"torch": torch.__version__, "triton": triton.__version__, "cudnn": torch.backends.cudnn.version()}
    about = {"date": datetime.date.today().isoformat(), "device": torch.cuda.get_device_name(), "dtype": "bfloat16"}
    record: dict[str, Any] = {**about, **versions, "rows": []}
    options.out.mkdir(parents=True, exist_ok=True)
    if options.selectors is not None:
        return _compare_selectors(options, record)
    for shape in _shapes(options):
        record["rows"].append(_measure(shape, options))
        (options.out / "attention.json").write_text(json.dumps(record, indent=1) + "\n")
    _print(record)
    _plot(record, options.out / "attention.png")
    return 0


def _parse(args: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 4096, 8192, 32768, 131072])
    parser.add_argument("--rules", nargs="+", default=["128/32", "128/16", "512/128", "1024/128"], help="L/K")
    parser.add_argument("--shapes", nargs="+", default=["32/8/128", "32/8/64", "9/3/64"], help="Hq/H/D")
    parser.add_argument("--peers", nargs="*", default=["flash", "flex", "eager"], help="beside cuDNN")
    parser.add_argument("--selectors", nargs="*", choices=SELECTORS, help="time these selections alone; default all")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path, default=RESULTS)
    return parser.parse_args(args)


def _shapes(options: argparse.Namespace) -> list[tuple[int, ...]]:
    """(Hq, H, D, L, K, T): every size and rule for the first shape, the first rule from 8k on for the others."""
    first, *others = [tuple(map(int, shape.split("/"))) for shape in options.shapes]
    rules = [tuple(map(int, rule.split("/"))) for rule in options.rules]
    shapes = [
        (*first, *rule, length) for rule in rules for length in options.tokens if rule == rules[0] or length > SHORT
    ]
    return shapes + [(*other, *rules[0], length) for other in others for length in options.tokens if length > 4096]


def _inputs(query_heads: int, heads: int, dim: int, length: int, seed: int = 0) -> list[Tensor]:
    """Query, key and value as a model passes them, (1, heads, T, D) views of (1, T, heads, D), and a gradient."""
    generator = torch.Generator("cuda").manual_seed(seed)
    options: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16, "generator": generator}
    counts = query_heads, heads, heads, query_heads
    return [torch.randn(1, length, count, dim, **options).transpose(1, 2) for count in counts]


def _gate() -> bool:
    """Output and gradients of the kernels err no more than 1.5x what eager PyTorch does, against float64."""
    *tensors, gradient = _inputs(8, 2, 128, 2049)
    config = Rule(16, 128, 32)
    chosen = select(tensors[1], tensors[2], config, impl="eager")
    results = []
    for impl, dtype in (("eager", torch.float64), ("eager", torch.bfloat16), ("triton", torch.bfloat16)):
        leaves = [tensor.to(dtype).requires_grad_() for tensor in tensors]
        output = sparse_attention(*leaves, config, selection=chosen, impl=impl)
        results.append([output, *torch.autograd.grad(output, leaves, gradient.to(dtype))])
    errors = [((got - truth).norm(), (eager - truth).norm()) for truth, eager, got in zip(*results, strict=True)]
    return all(bool(got <= 1.5 * eager) for got, eager in errors)


def _measure(shape: tuple[int, ...], options: argparse.Namespace) -> dict[str, Any]:
    query_heads, heads, dim, lag, keep, length = shape
    config = Rule(16, lag, keep)
    names = ("query_heads", "heads", "dim", "lag", "keep", "tokens")
    row: dict[str, Any] = dict(zip(names, shape, strict=True))
    tensors = _inputs(query_heads, heads, dim, length)
    time = functools.partial(_time, tensors, repeats=options.repeats, graphed=length <= GRAPHED)
    row["lrsa"] = time(lambda q, k, v: sparse_attention(q, k, v, config, impl="triton"))
    row["selection"] = _median(lambda: select_only(tensors, config), options.repeats, graphed=True)
    row["cudnn"] = _cudnn(shape[:3] + shape[5:], options.repeats)
    main_shape = shape[:5] == (32, 8, 128, 128, 32)
    if "flash" in options.peers and main_shape:
        row["flash"] = _dense(SDPBackend.FLASH_ATTENTION, tensors, time)
    if "flex" in options.peers and main_shape and SHORT < length <= 32768:
        row["flex"] = _flex(tensors, config, functools.partial(_time, tensors, repeats=options.repeats, graphed=False))
    if "eager" in options.peers and main_shape and length <= 8192:
        row["eager"] = _time(
            tensors, lambda q, k, v: sparse_attention(q, k, v, config, impl="eager"), repeats=3, graphed=False
        )
    pairs = attended_pairs(length, config)
    share = pairs / attended_pairs(length, None)
    row["pair_share"] = share
    for name, factor in (("forward", 1.0), ("both", 3.5)):
        row["lrsa"][f"tflops_{name}"] = 4 * query_heads * dim * pairs * factor / row["lrsa"][name] * 1e-9
        row["lrsa"][f"efficiency_{name}"] = row["cudnn"][name] * share / row["lrsa"][name]
        row["lrsa"][f"speedup_{name}"] = row["cudnn"][name] / row["lrsa"][name]
    _print_row(row)
    return row


def select_only(tensors: list[Tensor], config: Rule) -> None:
    """The fused selection without the list of indices that ``select`` makes for people."""
    from lrsa_lit.ops.sparse_attention.kernel_code import kernel_code
    from lrsa_lit.ops.sparse_attention.triton.fused_selection import fused_ranks
    from lrsa_lit.ops.sparse_attention.triton.work_tables import Geometry

    code = kernel_code(config.compressor, config.top_k)
    assert code is not None
    with torch.no_grad():
        fused_ranks(code, *tensors[:3], Geometry.of(config, (0, tensors[1].shape[2])))


def _selection_gate() -> bool:
    """The kernels keep what eager PyTorch keeps, but for one partition in 500: scores can tie up to rounding."""
    query, key, value, _ = _inputs(32, 8, 128, 16384)
    for name, selector in SELECTORS.items():
        config = Rule(16, 128, 32, compressor=selector)
        ours, exact = (select(key, value, config, query=query, impl=impl).indices for impl in ("triton", "eager"))
        flipped = (ours != exact).any(dim=-1).float().mean().item()
        print(f"{name}: {flipped:.2%} of the partitions keep other tokens than in eager PyTorch")
        if flipped > 0.002:
            return False
    return True


def _compare_selectors(options: argparse.Namespace, record: dict[str, Any]) -> int:
    """Times of the selectors, each beside that of lag-relative selection; 1 if one of them misses the bar."""
    for query_heads, heads, dim, lag, keep, length in _shapes(options):
        tensors, times = _inputs(query_heads, heads, dim, length), {}
        for name in dict.fromkeys(["LagRelative", *(options.selectors or SELECTORS)]):
            config = Rule(16, lag, keep, compressor=SELECTORS[name])
            times[name] = _median(functools.partial(select_only, tensors, config), options.repeats, graphed=True)
            ratio = times[name] / times["LagRelative"]
            shape = f"{query_heads}/{heads}/{dim} L={lag} K={keep} T={length}"
            print(
                f"{shape:34} {name:17} {times[name]:.3f} ms, {ratio:.2f}x", "" if ratio <= BAR else "MISSED", flush=True
            )
        record["rows"].append({"shape": shape, "ms": times})
    (options.out / "selection.json").write_text(json.dumps(record, indent=1) + "\n")
    _print(record)
    return int(any(ms > BAR * row["ms"]["LagRelative"] for row in record["rows"] for ms in row["ms"].values()))


@functools.cache
def _cudnn(shape: tuple[int, ...], repeats: int) -> Times:
    """Dense cuDNN in its fastest form: native grouped heads or repeated ones."""
    tensors = _inputs(*shape)
    group = shape[0] // shape[1]
    repeated = [tensors[0], *(part.repeat_interleave(group, dim=1) for part in tensors[1:3]), tensors[3]]
    times = []
    for form in (tensors, repeated):
        time = functools.partial(_time, form, repeats=repeats, graphed=shape[3] <= GRAPHED)
        times.append(_dense(SDPBackend.CUDNN_ATTENTION, form, time))
    return {name: min(result[name] for result in times) for name in times[0]}


def _dense(backend: SDPBackend, tensors: list[Tensor], time: Callable[..., Times]) -> Times:
    grouped = tensors[0].shape[1] != tensors[1].shape[1]
    with sdpa_kernel(backend):
        return time(lambda q, k, v: scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped))


def _flex(tensors: list[Tensor], config: Rule, time: Callable[..., Times]) -> Times:
    """FlexAttention given the rule in the form that suits it best: over [sinks and kept tokens | all tokens].

    Selection, block mask and the lookup of what is visible are built outside of the timing; the gather is inside.
    """
    key, value = tensors[1:3]
    length, group = key.shape[2], tensors[0].shape[1] // key.shape[1]
    compressed = [compressed_at(t, config) for t in range(length)]
    starts = torch.tensor([raw_start(count, config) for count in compressed], device="cuda")
    sizes = [config.sink_size + config.top_k * count if count else 0 for count in compressed]
    compact_ends = torch.tensor(sizes, device="cuda")
    kept = select(key, value, config).indices.flatten(2)
    sinks = torch.arange(config.sink_size, device="cuda").expand(*kept.shape[:2], -1)
    rows = torch.cat([sinks, kept], dim=2)[..., None].expand(-1, -1, -1, key.shape[3])
    n_compact = rows.shape[2]

    def visible(b: Tensor, h: Tensor, t: Tensor, j: Tensor) -> Tensor:
        return (j < compact_ends[t]) | ((j >= n_compact + starts[t]) & (j <= n_compact + t))

    mask = create_block_mask(visible, None, None, length, n_compact + length, device="cuda", _compile=True)
    compiled = torch.compile(flex_attention)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (torch.cat([part.gather(2, rows), part], dim=2) for part in (k, v))
        return compiled(q, k, v, block_mask=mask, enable_gqa=group > 1)

    return time(attend)


def _time(tensors: list[Tensor], attend: Callable[..., Tensor], *, repeats: int, graphed: bool) -> Times:
    """Medians in ms of forward, of forward + backward, of both without graphs; and peak memory over inputs in MiB."""
    *inputs, gradient = tensors
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]

    def forward() -> None:
        with torch.no_grad():
            attend(*leaves)

    def both() -> None:
        torch.autograd.grad(attend(*leaves), leaves, gradient)

    both()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    both()
    peak = (torch.cuda.max_memory_allocated() - before) / 2**20
    return {
        "forward": _median(forward, repeats, graphed),
        "both": _median(both, repeats, graphed),
        "launched": _median(both, repeats, False) if graphed else math.nan,
        "queued": _median(lambda: [both() for _ in range(_QUEUE)], repeats, False) / _QUEUE if graphed else math.nan,
        "peak_mib": peak,
    }


def _median(run: Callable[[], object], repeats: int, graphed: bool) -> float:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    if graphed:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        run, repeats = graph.replay, 5 * repeats
    times = []
    for _ in range(repeats):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop))
    return statistics.median(times)


def _print_row(row: dict[str, Any]) -> None:
    lrsa, dense = row["lrsa"], row["cudnn"]
    shape = "{query_heads}/{heads}/{dim} L={lag} K={keep} T={tokens}".format(**row)
    peers = " ".join(
        f"{name} {row[name]['forward']:.2f}/{row[name]['both']:.2f}"
        for name in ("flash", "flex", "eager")
        if name in row
    )
    print(
        f"{shape:34} lrsa {lrsa['forward']:.3f}/{lrsa['both']:.3f} ms",
        f"cudnn {dense['forward']:.3f}/{dense['both']:.3f}",
        f"efficiency {lrsa['efficiency_forward']:.3f}/{lrsa['efficiency_both']:.3f}",
        f"speed-up {lrsa['speedup_forward']:.2f}/{lrsa['speedup_both']:.2f}",
        f"without graphs {lrsa['queued']:.2f} queued, {lrsa['launched']:.2f} alone (cudnn {dense['queued']:.2f})",
        f"selection {row['selection']:.3f} ms",
        f"peak {lrsa['peak_mib']:.0f} vs {dense['peak_mib']:.0f} MiB",
        peers,
        sep=", ",
        flush=True,
    )


def _print(record: dict[str, Any]) -> None:
    about = {name: value for name, value in record.items() if name != "rows"}
    print(", ".join(f"{name} {value}" for name, value in about.items()))


def _plot(record: dict[str, Any], path: Path) -> None:
    """Speed-up of forward + backward over dense cuDNN, and what the pair count allows."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    main_shape = [row for row in record["rows"] if (row["query_heads"], row["dim"]) == (32, 128)]
    for index, rule in enumerate(dict.fromkeys((row["lag"], row["keep"]) for row in main_shape)):
        rows = [row for row in main_shape if (row["lag"], row["keep"]) == rule]
        tokens = [row["tokens"] for row in rows]
        label = f"L={rule[0]}, K={rule[1]}"
        axes.plot(tokens, [row["lrsa"]["speedup_both"] for row in rows], "o-", color=f"C{index}", label=label)
        axes.plot(tokens, [1 / row["pair_share"] for row in rows], "--", color=f"C{index}", alpha=0.5)
    axes.axhline(1, color="grey", linewidth=0.8)
    axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel="speed-up over dense cuDNN, forward + backward")
    axes.set_xticks(
        tokens_seen := sorted({row["tokens"] for row in main_shape}), [f"{count // 1024}k" for count in tokens_seen]
    )
    axes.minorticks_off()
    axes.set_yticks([1, 2, 4, 8], ["1x", "2x", "4x", "8x"])
    axes.set_title(f"{record['device']}, bf16, 32/8 heads, D=128\n(dashed: what the pair count allows)")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    sys.exit(main())
