"""Is LRSA attention as fast as its share of query-key pairs allows?

    python benchmarks/attention.py [--cells 32/8/128:128/32:32768 …] [--seconds 140]

Times the Triton kernels, selection and gather included, against dense cuDNN (torch SDPA), each in its fastest form:
forward, and forward + backward, medians in one process. A correctness gate comes first, and a red one ends the run.
Writes ``results/attention.json`` and ``attention.png``. Cells that the file has from the same commit, device and
versions are not measured again; none is begun after ``--seconds``. A cell that fails is written with the reason, and
the exit code is then 1. Other attentions: ``attention_peers.py``.

*Efficiency* = dense cuDNN time x (pairs attended / pairs of dense causal attention) / LRSA time: 1.0 means as good per
pair as cuDNN. Sizes up to 32k are timed as CUDA graphs, for LRSA and dense alike. ``queued`` is the time of forward +
backward without graphs, eight calls launched in a row as the layers of a model are; ``launched`` that of a single one.
``--device cpu`` tries it at small sizes, with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
from pathlib import Path
from typing import Any

from attention_cells import Cell, against, dense, gate, lrsa, parse
from records import Record, about
from selection import select_only
from timing import median
from torch.nn.attention import SDPBackend

from lrsa_lit.ops.sparse_attention import attended_pairs
from lrsa_lit.ops.sparse_attention.gluon import hopper

CELLS = [
    *(f"32/8/128:128/32:{tokens}" for tokens in (4096, 8192, 16384, 32768, 131072)),
    *(f"32/8/128:128/16:{tokens}" for tokens in (8192, 32768, 131072)),
    *(f"32/8/128:1024/128:{tokens}" for tokens in (8192, 32768, 131072)),
    *(f"{shape}:128/32:{tokens}" for shape in ("9/3/64", "32/8/64") for tokens in (8192, 32768)),
]


def main(args: list[str] | None = None) -> int:
    started, options = time.perf_counter(), parse(args, __doc__, CELLS)
    green = gate(options)
    print(f"correctness gate: {'green' if green else 'RED'}")
    if not green:
        return 1
    record = Record(options.out / "attention.json", about(device=options.device), Cell._fields)
    wanted = [(cell._asdict(), functools.partial(_measure, cell, options)) for cell in options.cells]
    for row in record.measure(wanted, started + options.seconds):
        _print_row(row)
    rows = [row for row in record.rows if "skipped" not in row]
    _plot({**record.about, "rows": rows}, options.out / "attention.png")
    return int(len(rows) < len(record.rows))


def _measure(cell: Cell, options: argparse.Namespace) -> dict[str, Any]:
    tensors = cell.inputs(options.device)
    ours = lrsa(cell, tensors, options.repeats)
    selecting = median(lambda: select_only(tensors, cell.rule), options.repeats, graphed=options.device == "cuda")
    cudnn = dense(SDPBackend.CUDNN_ATTENTION, cell, options.repeats, options.device)
    for name, factor in (("forward", 1.0), ("both", 3.5)):
        flops = 4 * cell.query_heads * cell.dim * attended_pairs(cell.tokens, cell.rule) * factor
        ours[f"tflops_{name}"] = flops / ours[name] * 1e-9
    ours |= against(ours, cudnn, cell.pair_share)
    more = {"pair_share": cell.pair_share, "hopper": hopper.suits(*tensors)}
    return {"lrsa": ours, "selection": selecting, "cudnn": cudnn, **more}


def _print_row(row: dict[str, Any]) -> None:
    cell = Cell(*(row[name] for name in Cell._fields))
    if "skipped" in row:
        print(f"{cell!s:34} skipped: {row['skipped']}", flush=True)
        return
    ours, cudnn = row["lrsa"], row["cudnn"]
    parts = [
        f"{cell!s:34} lrsa {ours['forward']:.3f}/{ours['both']:.3f} ms",
        f"cudnn {cudnn['forward']:.3f}/{cudnn['both']:.3f}",
        f"efficiency {ours['efficiency_forward']:.3f}/{ours['efficiency_both']:.3f}",
        f"speed-up {ours['speedup_forward']:.2f}/{ours['speedup_both']:.2f}",
        f"selection {row['selection']:.3f} ms",
    ]
    if "queued" in ours:
        queued, alone = ours["queued"], ours["launched"]
        parts.append(f"without graphs {queued:.2f} queued, {alone:.2f} alone (cudnn {cudnn['queued']:.2f})")
    if "peak_mib" in ours:
        parts.append(f"peak {ours['peak_mib']:.0f} vs {cudnn['peak_mib']:.0f} MiB")
    print(", ".join(parts), flush=True)


def _plot(record: dict[str, Any], path: Path) -> None:
    """Speed-up of forward + backward over dense cuDNN, and what the pair count allows."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    main_shape = [row for row in record["rows"] if (row["query_heads"], row["dim"]) == (32, 128)]
    for index, rule in enumerate(dict.fromkeys((row["lag"], row["keep"]) for row in main_shape)):
        rows = sorted(
            (row for row in main_shape if (row["lag"], row["keep"]) == rule), key=lambda row: int(row["tokens"])
        )
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
    if main_shape:
        axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    sys.exit(main())
