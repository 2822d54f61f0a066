"""What do GPUs that share the tokens of each row train, how fast, and how much do they send each other?

Run ``python benchmarks/context_parallel.py`` on a machine with two GPUs. Random weights of Llama-3.2-1B's shape, bf16,
LRSA with L=128 and K=16, AdamW, activations recomputed, one row a step, an answer of 64 tokens at its end. Parts:

- ``step``: a step at ``--tokens`` (128k) on one device, on two that share it, and dense on two that share it.
- ``longest``: the longest of ``--lengths`` that one device trains, and that two train.
- ``bytes``: what a device receives of others, a layer and step, for keys and values: measured where it is called for,
  beside what a ring of dense attention moves and K / L of that.

Each row runs in processes of its own through the same Trainer, strategy and task as ``lrsa fit``, which end after
``--limit``. Writes ``results/context_parallel.json``; rows that it has from the same commit, device and versions are
not measured again, and none is begun after ``--seconds``. ``--smoke`` runs all of it with a tiny model on a CPU.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning
import torch
from device_runs import Clock, OnDevice, batches, in_processes, record_of
from records import MissingError, Record
from torch import Tensor

from lrsa_lit.attention import LRSAConfig
from lrsa_lit.context_parallel import exchange
from lrsa_lit.models import Backbone
from lrsa_lit.tasks import LongContextQA

HERE = Path(__file__).parent
RULE = LRSAConfig(sink_size=16, lag_size=128, top_k=16)
SHAPE, WARM_UP = "llama-3.2-1b", 2
LENGTHS = [1 << 17, 3 << 16, 1 << 18, 3 << 17, 1 << 19, 5 << 17, 3 << 18, 7 << 17, 1 << 20]


KEYS = "part", "devices", "attention", "tokens", "steps"


def main(args: list[str] | None = None) -> int:
    started, options = time.perf_counter(), _parse(args)
    if options.one:
        _train(options)
        return 0
    record = record_of(options.out / "context_parallel.json", KEYS, rule=RULE, smoke=options.smoke)
    wanted: list[tuple[dict[str, Any], Callable[[], dict[str, Any]]]] = []
    for devices, attention in ((1, "lrsa"), (options.devices, "lrsa"), (options.devices, "dense")):
        if "step" in options.parts or ("bytes" in options.parts and devices > 1):
            key = dict(zip(KEYS, ("step", devices, attention, options.tokens, options.steps), strict=True))
            wanted.append((key, functools.partial(_in_processes, key, options)))
    for devices in (1, options.devices) if "longest" in options.parts else ():
        for tokens in options.lengths:
            key = dict(zip(KEYS, ("longest", devices, "lrsa", tokens, 1), strict=True))
            wanted.append((key, functools.partial(_longer, record, key, options)))
    for row in record.measure(wanted, started + options.seconds):
        print(json.dumps(row), flush=True)
    for devices in (1, options.devices):
        trained = [row["tokens"] for row in record.rows if "skipped" not in row and row["devices"] == devices]
        print(f"Longest row of {devices}: {max(trained, default=None)}")
    return int(any("skipped" in row for row in record.rows if row["part"] == "step"))


def _longer(record: Record, key: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """A row of ``longest``, if the shorter ones of as many devices were trained."""
    for row in record.rows:
        alike = row["part"] == "longest" and row["devices"] == key["devices"]
        if alike and "skipped" in row and row["tokens"] < key["tokens"]:
            raise MissingError(f"{row['tokens']} tokens were too many")
    return _in_processes(key, options)


def _parse(args: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--parts", nargs="+", choices=["step", "longest", "bytes"], default=["step", "longest", "bytes"]
    )
    parser.add_argument("--devices", type=int, default=2, help="that share each row")
    parser.add_argument("--tokens", type=int, default=1 << 17, help="of the rows of step and bytes")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help="that longest tries, ascending")
    parser.add_argument("--steps", type=int, default=5, help="measured steps, after the warm-up")
    parser.add_argument("--limit", type=float, default=300, help="seconds of a row, with its start")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no row after so many")
    parser.add_argument("--smoke", action="store_true", help="a tiny model on the CPU, with --tokens and --lengths")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    parser.add_argument("--one", choices=["step", "longest"], help=argparse.SUPPRESS)
    parser.add_argument("--attention", choices=["lrsa", "dense"], help=argparse.SUPPRESS)
    parser.add_argument("--row", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(args)


def _in_processes(key: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """A row, from processes that end with it."""
    flags = [part for name in KEYS[1:] for part in (f"--{name}", str(key[name]))]
    return in_processes(__file__, ["--one", key["part"], *flags, *["--smoke"] * options.smoke], seconds=options.limit)


def _train(options: argparse.Namespace) -> None:
    source = "tiny" if options.smoke else str(HERE / "shapes" / SHAPE)
    backbone = Backbone(source, dtype="bfloat16", random_weights=True, gradient_checkpointing=True)
    optimizer = functools.partial(torch.optim.AdamW, lr=1e-5, fused=not options.smoke)
    clock, counted = Clock(), _Counted()
    trainer = lightning.Trainer(
        accelerator="cpu" if options.smoke else "cuda",
        devices=options.devices,
        # One device is measured as a run on one device is: without weights to gather.
        strategy="auto" if options.devices == 1 else OnDevice(context=options.devices),
        max_steps=WARM_UP + options.steps,
        gradient_clip_val=1.0,
        callbacks=[clock],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    dense = {"train_attention": None} if options.attention == "dense" else {}
    task = LongContextQA(backbone, RULE, optimizer, **dense)
    # The same on all devices.
    trainer.fit(task, batches(options.tokens, WARM_UP + options.steps, 0, smoke=options.smoke))
    if not trainer.is_global_zero:
        return
    seconds, steps = statistics.median(clock.seconds[WARM_UP:]), WARM_UP + options.steps
    row = {
        "shape": "tiny" if options.smoke else SHAPE,
        "step_seconds": seconds,
        "slowest_step_seconds": max(clock.seconds[WARM_UP:]),
        "tokens_per_second": options.tokens / seconds,
        "peak_gib": clock.peak_gib,
        "loss": float(trainer.callback_metrics["train/loss"]),
        **_traffic(counted, task.model.config.get_text_config(), steps, options),
    }
    options.row.write_text(json.dumps(row))


def _traffic(counted: _Counted, config: Any, steps: int, options: argparse.Namespace) -> dict[str, Any]:
    """Bytes that this device has received for keys and values, a layer and step, and what a dense ring would move."""
    if options.devices == 1:
        return {}
    each = steps * config.num_hidden_layers
    received = {name: size / each for name, size in counted.received.items()}
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    pair = 2 * config.num_key_value_heads * dim * torch.bfloat16.itemsize
    # A ring moves all keys and values but one's own in the forward pass, again where it is recomputed, and their
    # gradients in the backward pass.
    ring = 3 * pair * options.tokens * (options.devices - 1) / options.devices
    return {
        "received_bytes_a_layer": received,
        "ring_bytes_a_layer": ring,
        "of_ring": sum(received.values()) / ring,
        "k_over_l": RULE.top_k / RULE.lag_size,
    }


class _Counted:
    """Counts the bytes that shared rows bring from other devices."""

    def __init__(self) -> None:
        self.received = {"halos": 0, "compact": 0, "gradients of compact": 0}
        self._calls = exchange.all_to_all, exchange.all_gather, exchange.reduce_scatter
        exchange.all_to_all, exchange.all_gather = self._all_to_all, self._all_gather
        exchange.reduce_scatter = self._reduce_scatter

    def _all_to_all(
        self, output: Tensor, given: Tensor, incoming: list[int], outgoing: list[int], *, group: Any
    ) -> Any:
        others = sum(incoming) - incoming[group.rank()]
        self.received["halos"] += _bytes(output) * others // max(sum(incoming), 1)
        return self._calls[0](output, given, incoming, outgoing, group=group)

    def _all_gather(self, output: Tensor, given: Tensor, **options: Any) -> Any:
        self.received["compact"] += _bytes(output) - _bytes(given)
        return self._calls[1](output, given, **options)

    def _reduce_scatter(self, output: Tensor, given: Tensor, **options: Any) -> Any:
        self.received["gradients of compact"] += _bytes(given) - _bytes(output)
        return self._calls[2](output, given, **options)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


if __name__ == "__main__":
    sys.exit(main())
