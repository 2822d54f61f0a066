r"""How long a training step takes, and how much memory, with LRSA and with dense attention in the same trainer.

Random weights of a real shape, bf16, AdamW, gradients clipped, layers compiled, every layer checkpointed unless
``--keep-activations``, a loss at the last tokens of each context. Writes ``results/train_step.json``; rows that it has
from the same commit, device and versions are not measured again, and none is begun after ``--seconds``. A row that
fails is written with the reason, and the exit code is then 1; out of memory is a result.

    python benchmarks/train_step.py --tokens 32768 131072 --attention lrsa cudnn flash
    python benchmarks/train_step.py --shape smollm2-135m --tokens 8192 --batch 8 --top-k 32 --keep-activations
    python benchmarks/train_step.py --shape smollm2-135m --tokens 4096 --batch 8 --lag-size 512 --top-k 32 \
        --dense-layers 18 23 --keep-activations --dtype float32 --precision bf16-mixed
    python benchmarks/train_step.py --shape smollm2-135m --tokens 4096 --batch 8 --top-k 32 --attention lrsa \
        --objective answers kl kl_cached hidden next_tokens --keep-activations --dtype float32 --precision bf16-mixed
    python benchmarks/train_step.py --shape qwen3-1.7b --tokens 8192 32768 --eager \
        --dtype float32 --precision bf16-mixed    # as configs/trainer/full.yaml
    python benchmarks/train_step.py --shape mistral-7b-v0.3 --tokens 8192 32768 --eager --lora    # as lora.yaml
    python benchmarks/train_step.py --tokens 262144 393216 --warm-up 1 --steps 1 --attention lrsa    # what still fits
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from records import RESULTS, Record, about
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader

from lrsa_lit.attention import LRSAConfig
from lrsa_lit.data.collate import ExampleSize, TrainBatch
from lrsa_lit.models import Backbone, LoRA
from lrsa_lit.models.flops import Shape, peak_flops
from lrsa_lit.objectives import AnswerLoss, Distillation, HiddenAlignment, LanguageModelLoss, Objective, Sum
from lrsa_lit.objectives.work import flops
from lrsa_lit.tasks import LongContextQA

HERE = Path(__file__).parent
LABELS = 256
"""Answer tokens of a context."""

KEYS = (
    "shape", "attention", "objective", "tokens", "batch", "rule", "dtype", "precision", "compiled", "lora",
    "checkpointing",
)  # fmt: skip
OBJECTIVES: dict[str, Callable[[int], Objective]] = {
    "answers": lambda _: AnswerLoss(),
    "kl": lambda _: Sum([AnswerLoss(), Distillation(positions=1024)]),
    "kl_cached": lambda vocabulary: Sum([AnswerLoss(), _cached(vocabulary)]),
    "hidden": lambda _: Sum([AnswerLoss(), HiddenAlignment(positions=1024)]),
    "next_tokens": lambda _: LanguageModelLoss(share=0.25),
}
"""Made for a vocabulary of so many tokens."""

_DENSE = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}


def main(args: list[str] | None = None) -> int:
    started, options = time.perf_counter(), _parse(args)
    # It would hand the dense attention that was compiled first to all of them.
    torch._functorch.config.enable_autograd_cache = False
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    record = Record(options.out / "train_step.json", about("transformers", "lightning", device=device), KEYS)
    wanted = [
        (_key(attention, objective, tokens, options), functools.partial(measure, attention, objective, tokens, options))
        for tokens, attention in itertools.product(options.tokens, options.attention)
        for objective in (options.objective if attention == "lrsa" else ["answers"])
    ]
    for row in record.measure(wanted, started + options.seconds):
        print(_line(row), flush=True)
    return int(any("skipped" in row for row in record.rows))


def _parse(args: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llama-3.2-1b", help="a folder of shapes/")
    parser.add_argument("--tokens", type=int, nargs="+", default=[32768, 131072])
    parser.add_argument("--attention", nargs="+", default=["lrsa", "cudnn", "flash"], choices=["lrsa", *_DENSE])
    parser.add_argument("--objective", nargs="+", default=["answers"], choices=OBJECTIVES, help="of LRSA")
    parser.add_argument("--batch", type=int, default=1, help="contexts in a step")
    parser.add_argument("--lag-size", type=int, default=128)
    parser.add_argument("--top-k", type=int, default=16)
    parser.add_argument("--dense-layers", type=int, nargs="+", default=[], help="layers that LRSA leaves dense")
    parser.add_argument("--steps", type=int, default=3, help="steps that are timed")
    parser.add_argument("--warm-up", type=int, default=2, help="steps before them, at least 1")
    parser.add_argument("--keep-activations", action="store_true", help="no checkpointing")
    parser.add_argument("--eager", action="store_true", help="do not compile the layers")
    parser.add_argument("--lora", action="store_true", help="train adapters alone")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"], help="of the weights")
    parser.add_argument("--precision", default="32-true", help="Lightning's, such as bf16-mixed for float32 weights")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no row after so many")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(args)
    if options.warm_up < 1:
        parser.error(f"--warm-up: {options.warm_up} is not allowed; the first step compiles and is not timed")
    return options


def _rule(options: argparse.Namespace) -> LRSAConfig:
    return LRSAConfig(
        sink_size=16, lag_size=options.lag_size, top_k=options.top_k, dense_layers=tuple(options.dense_layers)
    )


def _key(attention: str, objective: str, tokens: int, options: argparse.Namespace) -> dict[str, Any]:
    """What tells the row from others."""
    rule = _rule(options).to_dict() if attention == "lrsa" else None
    more = options.batch, rule, options.dtype, options.precision, not options.eager, options.lora
    return dict(
        zip(KEYS, (options.shape, attention, objective, tokens, *more, not options.keep_activations), strict=True)
    )


def measure(attention: str, objective: str, tokens: int, options: argparse.Namespace) -> dict[str, Any]:
    """Train for a few steps; out of memory is a result too."""
    try:
        return _train(attention, objective, _rule(options), tokens, options)
    except torch.cuda.OutOfMemoryError:
        return {"out_of_memory": True}
    finally:
        torch._dynamo.reset()


def _train(
    attention: str, objective: str, rule: LRSAConfig, tokens: int, options: argparse.Namespace
) -> dict[str, Any]:
    backbone = Backbone(
        str(HERE / "shapes" / options.shape),
        random_weights=True,
        dtype=options.dtype,
        gradient_checkpointing=not options.keep_activations,
        compile_layers=not options.eager,
        lora=LoRA() if options.lora else None,
    )
    # Under mixed precision Lightning clips no gradients of a fused optimizer. None lets torch take all weights at once.
    fused = True if torch.cuda.is_available() and not options.precision.endswith("mixed") else None
    task = LongContextQA(
        backbone,
        rule,
        optimizer=functools.partial(torch.optim.AdamW, lr=1e-5, fused=fused),
        train_attention={} if attention == "lrsa" else None,
        objective=OBJECTIVES[objective](backbone.config.vocab_size),
    )
    watch = Watch(options.warm_up)
    trainer = Trainer(
        accelerator="auto",
        devices=1,
        precision=options.precision,
        max_steps=options.warm_up + options.steps,
        gradient_clip_val=1.0,
        callbacks=[watch],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    batch = _batch(backbone.config.vocab_size, tokens, options.batch)
    loader = DataLoader([batch] * trainer.max_steps, collate_fn=lambda rows: rows[0], batch_size=1)
    with contextlib.ExitStack() as stack:
        if attention in _DENSE and torch.cuda.is_available():
            stack.enter_context(sdpa_kernel(_DENSE[attention]))
        trainer.fit(task, loader)
    sizes = [ExampleSize(tokens, LABELS)] * options.batch
    work = flops(task.objective, Shape.of(task.model), sizes, rule if attention == "lrsa" else None)
    row = {
        "seconds": watch.seconds,
        "host_seconds": watch.host_seconds,
        "tokens_per_second": tokens * options.batch / watch.seconds,
        "tflops": work / watch.seconds / 1e12,
        "loss": watch.loss,
    }
    if torch.cuda.is_available():
        peak = peak_flops(torch.cuda.get_device_name())
        row |= {"peak_gib": torch.cuda.max_memory_allocated() / 2**30, "mfu": peak and work / watch.seconds / peak}
    return row


class Watch(Callback):
    """Seconds of the steps behind the warm-up, the device being waited for before and behind all of them alone.

    The first one compiles, and needs memory that only that needs. ``host_seconds`` leaves the second wait out: where
    the host, which runs ahead, takes as long as all, the device waits for it.
    """

    def __init__(self, warm_up: int) -> None:
        self.warm_up = warm_up
        self.seconds = self.host_seconds = self.loss = float("nan")
        self._since = 0.0

    def on_train_batch_start(self, trainer: Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        """Start the clock once the warm-up is over."""
        if batch_idx == 1 and torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        if batch_idx == self.warm_up:
            self._since = _now()

    def on_train_end(self, trainer: Trainer, module: Any) -> None:
        """Stop the clock."""
        steps = trainer.max_steps - self.warm_up
        self.host_seconds = (time.perf_counter() - self._since) / steps
        self.seconds = (_now() - self._since) / steps
        self.loss = float(trainer.callback_metrics["train/loss"])


def _cached(vocabulary: int) -> Distillation:
    """Of the 32 likeliest tokens of a teacher that is read from memory, whatever they are."""
    term = Distillation("none", positions=1024, top_n=32, cached=True)
    term.as_cached().make_up(vocabulary)
    return term


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def _batch(vocabulary: int, tokens: int, count: int) -> TrainBatch:
    ids = torch.randint(vocabulary, (count, tokens), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, :-LABELS] = -100
    columns: Tensor = torch.arange(tokens - LABELS - 1, tokens - 1)
    return TrainBatch(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        labels=labels,
        label_columns=columns,
        position_ids=None,
        boundaries=None,
        id=[str(row) for row in range(count)],
        position=list(range(count)),
        sizes=[ExampleSize(tokens, LABELS)] * count,
        step_sizes=[ExampleSize(tokens, LABELS)] * count,
    )


def _line(row: dict[str, Any]) -> str:
    head = f"{row['shape']:14} {row['attention']:6} {row['objective']:11} T={row['tokens']:<7} B={row['batch']}"
    if "out_of_memory" in row or "skipped" in row:
        return f"{head} {row.get('skipped', 'out of memory')}"
    mfu = f", MFU {row['mfu']:.3f}" if row.get("mfu") else ""
    memory = f", {row['peak_gib']:.2f} GiB" if "peak_gib" in row else ""
    return (
        f"{head} {row['seconds']:.3f} s, {row['tokens_per_second']:.0f} tokens/s{memory}{mfu}, loss {row['loss']:.2f}"
    )


if __name__ == "__main__":
    raise SystemExit(main())
