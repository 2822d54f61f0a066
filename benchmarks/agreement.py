"""Do the ways to run a model agree? Next tokens of the parallel pass and of reading chunk by chunk through a cache.

Run ``python benchmarks/agreement.py --text FILE``: contexts of 4,096 tokens are cut from the file. In bf16 two orders
of summation give different logits and, now and then, another next token: the dense model's own two ways are the
yardstick.
Prints one line per attention and how often the next tokens agree.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor
from transformers import DynamicCache

from lrsa_lit.attention import LRSACache, LRSAConfig, using
from lrsa_lit.models import Backbone
from lrsa_lit.paths import shipped

RULES = {"dense": None, "L=128 K=32": LRSAConfig(16, 128, 32), "L=128 K=16": LRSAConfig(16, 128, 16)}


def main(args: list[str] | None = None) -> int:
    options = _parse(args)
    settings = yaml.safe_load(shipped("configs/model/smollm2.yaml").read_text())["model"]["backbone"]
    backbone = Backbone(**({"source": options.model} if options.model else settings), dtype="bfloat16")
    model: Any = backbone.build().eval().cuda()
    ids = torch.tensor(backbone.tokenizer(options.text.read_text(encoding="utf-8"), verbose=False)["input_ids"])
    rows = ids[: len(ids) // options.tokens * options.tokens].view(-1, options.tokens)[: options.contexts].cuda()
    print(f"{backbone.name}, bfloat16, {torch.cuda.get_device_name()}, {len(rows)} contexts of {options.tokens} tokens")
    for name, rule in RULES.items():
        shares = [_agreement(model, row[None], rule, size) for row in rows for size in options.chunks]
        print(f"{name}: same next token in {100 * sum(shares) / len(shares):.3f} % of the positions")
    return 0


def _parse(args: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="default: the model of configs/model/smollm2.yaml")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--contexts", type=int, default=16)
    parser.add_argument("--chunks", type=int, nargs="+", default=[512, 1000])
    return parser.parse_args(args)


@torch.no_grad()
def _agreement(model: Any, ids: Tensor, rule: LRSAConfig | None, size: int) -> float:
    """Share of positions at which both ways have the same most likely next token."""
    with using(model, rule):
        whole = model(ids, use_cache=False).logits[0].argmax(-1)
        cache = DynamicCache() if rule is None else LRSACache.of(model)
        parts = [model(ids[:, at : at + size], past_key_values=cache).logits for at in range(0, ids.shape[1], size)]
    return float((torch.cat(parts, dim=1)[0].argmax(-1) == whole).float().mean())


if __name__ == "__main__":
    sys.exit(main())
