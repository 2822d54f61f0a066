"""How much faster do two GPUs train than one, and what do they train together that one cannot hold?

Run ``python benchmarks/two_gpus.py`` on a machine with two GPUs. Random weights of real shapes (``shapes/``), bf16,
LRSA with L=128 and K=16, AdamW, activations recomputed, one sequence a device and step, an answer of 64 tokens at its
end. Cases: ``ddp`` (Llama-3.2-1B, all weights, on 1 and 2 devices), ``lora`` and ``full`` (Llama-3.1-8B under FSDP2,
adapters or all weights, on 2 devices). Each runs in processes of its own through the same Trainer, strategies and task
as ``lrsa fit``. Writes ``results/two_gpus.json``; ``--smoke`` runs all of it with tiny models on a CPU.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import functools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning
import torch
import transformers
from lightning.pytorch import Callback
from lightning.pytorch.strategies import DDPStrategy
from torch.utils.data import DataLoader

from lrsa_lit.attention import LRSAConfig
from lrsa_lit.data.collate import collate
from lrsa_lit.models import Backbone, LoRA
from lrsa_lit.strategies import FullySharded
from lrsa_lit.tasks import LongContextQA

HERE = Path(__file__).parent
RULE = LRSAConfig(sink_size=16, lag_size=128, top_k=16)
ANSWER, WARM_UP, GIB = 64, 3, 2**30
CASES = {"ddp": ("llama-3.2-1b", [1, 2]), "lora": ("llama-3.1-8b", [2]), "full": ("llama-3.1-8b", [2])}


def main(args: list[str] | None = None) -> int:
    options = _parse(args)
    if options.one:
        _train(options)
        return 0
    rows: list[dict[str, Any]] = []
    for case in options.cases:
        for devices in CASES[case][1]:
            row = _in_processes(case, devices, options)
            print(json.dumps(row), flush=True)
            rows.append(row)
    rates = {row["devices"]: row["tokens_per_second"] for row in rows if row["case"] == "ddp" and "error" not in row}
    record = {
        "date": datetime.date.today().isoformat(),
        "device": "cpu" if options.smoke else torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "lightning": lightning.__version__,
        "dtype": "bfloat16",
        "rule": str(RULE),
        "rows": rows,
        "ddp_speed_up": rates[2] / rates[1] if len(rates) == 2 else None,
    }
    print(f"DDP, 2 devices against 1: {record['ddp_speed_up']}")
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "two_gpus.json").write_text(json.dumps(record, indent=1) + "\n")
    return int(any("error" in row for row in rows))


def _parse(args: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--steps", type=int, default=10, help="measured steps, after the warm-up")
    parser.add_argument("--no-checkpointing", action="store_true", help="keep activations")
    parser.add_argument("--smoke", action="store_true", help="tiny models on the CPU")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    parser.add_argument("--one", choices=CASES, help=argparse.SUPPRESS)
    parser.add_argument("--devices", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--row", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(args)


def _in_processes(case: str, devices: int, options: argparse.Namespace) -> dict[str, Any]:
    """Run a case in processes that end with it; its row, or what went wrong."""
    row = options.out / f".two_gpus-{case}-{devices}.json"
    options.out.mkdir(parents=True, exist_ok=True)
    row.unlink(missing_ok=True)
    command = [sys.executable, str(Path(__file__).resolve()), "--one", case, "--devices", str(devices)]
    command += ["--row", str(row), "--tokens", str(options.tokens), "--steps", str(options.steps)]
    command += ["--no-checkpointing"] * options.no_checkpointing + ["--smoke"] * options.smoke
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    if done.returncode or not row.exists():
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return {"case": case, "devices": devices, "error": last[:300]}
    found: dict[str, Any] = json.loads(row.read_text())
    row.unlink()
    return found


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
    clock = _Clock()
    strategy = DDPStrategy(gradient_as_bucket_view=True) if case == "ddp" else _OnDevice()
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
    trainer.fit(LongContextQA(backbone, RULE, optimizer), _batches(options))
    if not trainer.is_global_zero:
        return
    seconds = statistics.median(clock.seconds[WARM_UP:])
    row = {
        "case": case,
        "shape": "tiny" if options.smoke else shape,
        "devices": options.devices,
        "tokens": options.tokens,
        "gradient_checkpointing": not options.no_checkpointing,
        "step_seconds": seconds,
        "slowest_step_seconds": max(clock.seconds[WARM_UP:]),
        "tokens_per_second": options.devices * options.tokens / seconds,
        "peak_gib": clock.peak_gib,
        "loss": float(trainer.callback_metrics["train/loss"]),
    }
    options.row.write_text(json.dumps(row))


def _batches(options: argparse.Namespace) -> DataLoader[Any]:
    """A batch of one sequence for each step, another one on each device."""
    generator = torch.Generator().manual_seed(int(os.environ.get("LOCAL_RANK", "0")))
    vocabulary = 259 if options.smoke else 128256
    examples = [
        {
            "id": str(step),
            "input_ids": torch.randint(3, vocabulary, (options.tokens,), generator=generator).tolist(),
            "prompt_length": options.tokens - ANSWER,
            "gold_spans": [],
            "answer_spans": [],
            "answers": [""],
            "match": "any",
        }
        for step in range(WARM_UP + options.steps)
    ]
    return DataLoader(examples, collate_fn=functools.partial(collate, pad_token_id=2), pin_memory=not options.smoke)


class _OnDevice(FullySharded):
    """Draws the random weights where they are sharded: a CPU would take minutes for them."""

    @contextlib.contextmanager
    def tensor_init_context(self, empty_init: bool | None = None) -> Iterator[None]:
        with self.root_device:
            yield


class _Clock(Callback):
    """Seconds of each step, of all devices together, and the largest peak of memory since training started."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.peak_gib = 0.0
        self._since = 0.0

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        _wait(trainer)
        self._since = time.perf_counter()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        _wait(trainer)
        self.seconds.append(time.perf_counter() - self._since)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        peak = torch.cuda.max_memory_allocated() / GIB if torch.cuda.is_available() else 0.0
        self.peak_gib = float(trainer.strategy.reduce(torch.tensor(peak, device=pl_module.device), reduce_op="max"))


def _wait(trainer: Any) -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    trainer.strategy.barrier()


if __name__ == "__main__":
    sys.exit(main())
