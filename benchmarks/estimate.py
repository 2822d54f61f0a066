"""Does ``lrsa fit --estimate`` foretell the memory and time of a fit?

Run ``python benchmarks/estimate.py`` on a CUDA device. For three configurations with random weights the estimate from a
few layers stands beside what all layers then take, in the same loop of Lightning's Trainer. The aim is 15 %. Writes
``results/estimate.json``; ``--smoke`` runs tiny models on a CPU, where other processes disturb the seconds.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers

from lrsa_lit.attention import LRSAConfig
from lrsa_lit.cli.estimate import cost_of
from lrsa_lit.cli.step_cost import Batches, Cost, measure
from lrsa_lit.data.collate import collate
from lrsa_lit.models import Backbone, LoRA
from lrsa_lit.tasks import LongContextQA

HERE = Path(__file__).parent
ANSWER, AIM, GIB = 64, 0.15, 2**30
CASES: dict[str, dict[str, Any]] = {
    "1b-32k-full": {"shape": "llama-3.2-1b", "tokens": 32768},
    "1b-8k-dense-layers": {"shape": "llama-3.2-1b", "tokens": 8192, "dense_layers": (0, 8), "keep": True},
    "8b-32k-lora": {"shape": "llama-3.1-8b", "tokens": 32768, "lora": LoRA()},
}


def main(args: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--smoke", action="store_true", help="tiny models on the CPU")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    options = parser.parse_args(args)
    rows = []
    for name in options.cases:
        rows.append({"case": name, **_compare(**CASES[name], smoke=options.smoke)})
        print(json.dumps(rows[-1]), flush=True)
    record = {
        "date": datetime.date.today().isoformat(),
        "device": "cpu" if options.smoke else torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "rows": rows,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "estimate.json").write_text(json.dumps(record, indent=1) + "\n")
    worst = max(abs(row[f"{what}_ratio"] - 1) for row in rows for what in ("peak", "seconds"))
    print(f"furthest off: {worst:.1%}")
    return int(worst > AIM)


def _compare(
    *,
    shape: str,
    tokens: int,
    smoke: bool,
    dense_layers: tuple[int, ...] = (),
    keep: bool = False,
    lora: LoRA | None = None,
) -> dict[str, Any]:
    """Estimated and measured peak and seconds of a step."""
    tokens = 512 if smoke else tokens
    backbone = Backbone(
        _tiny_shape() if smoke else str(HERE / "shapes" / shape),
        dtype="float32" if smoke else "bfloat16",
        random_weights=True,
        gradient_checkpointing=not keep,
        lora=lora,
    )
    rule = LRSAConfig(sink_size=16, lag_size=128, top_k=16, dense_layers=dense_layers)
    optimizer = functools.partial(torch.optim.AdamW, lr=1e-5)
    options = {"accelerator": "cpu" if smoke else "cuda", "gradient_clip_val": 1.0}
    batches = _batches(tokens)
    estimated, layers = cost_of(LongContextQA(backbone, rule, optimizer), batches, options)
    measured = measure(LongContextQA(backbone, rule, optimizer), batches, options)
    return {
        "shape": "tiny" if smoke else shape,
        "tokens": tokens,
        "measured_layers": [sum(pair) for pair in layers],
        "parameters": measured.parameters,
        "parameters_exact": estimated.parameters == measured.parameters,
        "estimated_peak_gib": estimated.peak / GIB,
        "peak_gib": measured.peak / GIB,
        "peak_ratio": estimated.peak / measured.peak,
        "estimated_seconds": _seconds(estimated),
        "seconds": _seconds(measured),
        "seconds_ratio": _seconds(estimated) / _seconds(measured),
    }


def _seconds(cost: Cost) -> float:
    return cost.pass_seconds + cost.step_seconds


def _batches(tokens: int) -> Batches:
    example = {
        "id": "",
        "input_ids": torch.randint(3, 259, (tokens,), generator=torch.Generator().manual_seed(0)).tolist(),
        "prompt_length": tokens - ANSWER,
        "gold_spans": [],
        "answer_spans": [],
        "answers": [""],
        "match": "any",
    }
    batch = collate([example], pad_token_id=2)  # type: ignore[list-item]
    return Batches(batch, [batch])


def _tiny_shape() -> str:
    import tempfile

    from lrsa_lit.models.tiny import tiny_config

    folder = tempfile.mkdtemp()
    tiny_config(num_layers=10, hidden_size=128).save_pretrained(folder)
    return folder


if __name__ == "__main__":
    sys.exit(main())
