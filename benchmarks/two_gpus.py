"""How much faster do two GPUs train than one, and what do they train together that one cannot hold?

Run ``python benchmarks/two_gpus.py`` on a machine with two GPUs. Random weights of real shapes (``shapes/``), bf16,
LRSA with L=128 and K=16, AdamW, activations recomputed, one sequence a device and step, an answer of 64 tokens at its
end. Cases: ``ddp`` (Llama-3.2-1B, all weights, on 1 and 2 devices), ``lora`` and ``full`` (Llama-3.1-8B under FSDP2,
adapters or all weights, on 2 devices). Each runs in processes of its own through the same Trainer, strategies and task
as ``lrsa fit``. Writes ``results/two_gpus.json``; ``--smoke`` runs all of it with tiny models on a CPU.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import sys
from pathlib import Path
from typing import Any

import lightning
import torch
from device_runs import Clock, OnDevice, batches, in_processes, record_of
from lightning.pytorch.strategies import DDPStrategy

from lrsa_lit.attention import LRSAConfig
from lrsa_lit.models import Backbone, LoRA
from lrsa_lit.tasks import LongContextQA

HERE = Path(__file__).parent
RULE = LRSAConfig(sink_size=16, lag_size=128, top_k=16)
WARM_UP = 3
KEYS = "case", "devices", "tokens", "steps", "gradient_checkpointing"
CASES = {"ddp": ("llama-3.2-1b", [1, 2]), "lora": ("llama-3.1-8b", [2]), "full": ("llama-3.1-8b", [2])}


def main(args: list[str] | None = None) -> int:
    options = _parse(args)
    if options.one:
        _train(options)
        return 0
    record = record_of(options.out / "two_gpus.json", KEYS, rule=RULE, smoke=options.smoke)
    wanted = []
    for case in options.cases:
        for devices in CASES[case][1]:
            values = case, devices, options.tokens, options.steps, not options.no_checkpointing
            key = dict(zip(KEYS, values, strict=True))
            wanted.append((key, functools.partial(_in_processes, key, options)))
    for row in record.measure(wanted):
        print(json.dumps(row), flush=True)
    rates = {
        row["devices"]: row["tokens_per_second"] for row in record.rows if row["case"] == "ddp" and row.get("loss")
    }
    if len(rates) == 2:
        print(f"DDP, 2 devices against 1: {rates[2] / rates[1]}")
    return int(any("skipped" in row for row in record.rows))


def _parse(args: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--steps", type=int, default=10, help="measured steps, after the warm-up")
    parser.add_argument("--no-checkpointing", action="store_true", help="keep activations")
    parser.add_argument("--limit", type=float, default=600, help="seconds of a row, with its start")
    parser.add_argument("--smoke", action="store_true", help="tiny models on the CPU")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    parser.add_argument("--one", choices=CASES, help=argparse.SUPPRESS)
    parser.add_argument("--devices", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--row", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(args)


def _in_processes(key: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """A row, from processes that end with it."""
    flags = ["--one", key["case"], *(part for name in KEYS[1:4] for part in (f"--{name}", str(key[name])))]
    flags += ["--no-checkpointing"] * options.no_checkpointing + ["--smoke"] * options.smoke
    return in_processes(__file__, flags, seconds=options.limit)


def _train(options: argparse.Namespace) -> None:
    case, shape = options.one, CASES[options.one][0]
    backbone = Backbone(
        "tiny" if options.smoke else str(HERE / "shapes" / shape),
        dtype="bfloat16",
        random_weights=True,
        gradient_checkpointing=not options.no_checkpointing,
        lora=LoRA() if case == "lora" else None,
    )
    optimizer = functools.partial(torch.optim.AdamW, lr=1e-5, fused=not options.smoke)
    clock = Clock()
    strategy = DDPStrategy(gradient_as_bucket_view=True) if case == "ddp" else OnDevice()
    trainer = lightning.Trainer(
        accelerator="cpu" if options.smoke else "cuda",
        devices=options.devices,
        # One device is measured as a run on one device is: without gradients to exchange.
        strategy="auto" if options.devices == 1 else strategy,
        max_steps=WARM_UP + options.steps,
        gradient_clip_val=1.0,
        callbacks=[clock],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    seed = int(os.environ.get("LOCAL_RANK", "0"))
    of_device = batches(options.tokens, WARM_UP + options.steps, seed, smoke=options.smoke)
    trainer.fit(LongContextQA(backbone, RULE, optimizer), of_device)
    if not trainer.is_global_zero:
        return
    seconds = statistics.median(clock.seconds[WARM_UP:])
    row = {
        "shape": "tiny" if options.smoke else shape,
        "step_seconds": seconds,
        "slowest_step_seconds": max(clock.seconds[WARM_UP:]),
        "tokens_per_second": options.devices * options.tokens / seconds,
        "peak_gib": clock.peak_gib,
        "loss": float(trainer.callback_metrics["train/loss"]),
    }
    options.row.write_text(json.dumps(row))


if __name__ == "__main__":
    sys.exit(main())
