"""A cache of latents against one of keys and values, of the same model of low rank, on the CPU in float32.

    python benchmarks/latent_cache.py [--tokens 1024] [--answer 16] [--rank 96]

SmolLM2-135M, whitened as benchmarks/low_rank.py has it, reads the first tokens of a HotpotQA context and then single
tokens, under S=16 L=128 K=32 and densely: a latent of each head, latents of a layer whose heads share their tokens, and
latents of a layer of which the union of what its heads keep would be held. Prints what the logits differ by, the bytes
as a share of a dense cache of keys and values, and seconds a token; writes ``results/latent_cache_DATE_cpu.json``.
"""

from __future__ import annotations

import argparse
import datetime
import json
import time
from typing import Any

import torch
from low_rank import RESULTS, contexts
from torch import Tensor

from lrsa_lit.attention import LRSACache, LRSAConfig, enable, observing, prefill
from lrsa_lit.data import HotpotQA
from lrsa_lit.models import Backbone, LowRank, whitening
from lrsa_lit.models.factors import factor
from lrsa_lit.ops.sparse_attention import SharedHeads, select
from lrsa_lit.paths import shipped
from lrsa_lit.yaml_file import read_settings

RULE = LRSAConfig(sink_size=16, lag_size=128, top_k=32)
FORMS = {
    "head": ("head", RULE),
    "joint, heads alike": ("joint", RULE.replace(compressor=SharedHeads())),
    "head, everything kept": ("head", RULE.replace(top_k=128)),
    "joint, everything kept": ("joint", RULE.replace(top_k=128)),
}
"""The grouping of the factors, and the rule."""


@torch.no_grad()
def run(model: Any, config: LRSAConfig, ids: Tensor, answer: int) -> tuple[Tensor, float, float, float]:
    """Logits behind the prompt, share of a dense cache that is held and that was the peak, and seconds a token."""
    cache = LRSACache.of(enable(model, config))
    parts = [prefill(model, ids[:, :-answer], cache)]
    (held,) = cache.measured(1)
    began = time.perf_counter()
    parts += [prefill(model, token, cache) for token in ids[:, -answer:].split(1, dim=1)]
    token = (time.perf_counter() - began) / answer
    return torch.cat([part[:, -1:] for part in parts], dim=1), held.held / held.dense, held.peak / held.dense, token


@torch.no_grad()
def union(model: Any, ids: Tensor) -> float:
    """Tokens of a partition that some head of a layer keeps, mean over partitions and layers."""
    sizes: list[float] = []

    def observe(attached: Any, layout: Any, query: Tensor, key: Tensor, value: Tensor) -> None:
        indices = select(key, value, attached.rule).indices[0]  # (H, P, K)
        sizes.extend(len(indices[:, part].unique()) for part in range(indices.shape[1]))

    with observing(enable(model, RULE), observe):
        model(ids, use_cache=False, logits_to_keep=1)
    return sum(sizes) / len(sizes)


def main() -> None:
    """Compare both caches of each form."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("tokens", 1024), ("answer", 16), ("rank", 96)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    backbone = Backbone(**read_settings(shipped("configs/model/smollm2.yaml"))["model"]["backbone"])
    data = HotpotQA(tokenizer=backbone.tokenizer, max_tokens=4096)
    ids = torch.tensor(contexts(data, "val", 1, options.tokens + options.answer))
    moments = whitening.measure(backbone.build(), contexts(data, "train", 8, 512))
    found: dict[str, Any] = {}
    for form, (grouping, config) in FORMS.items():
        model: Any = backbone.build().eval()
        heads = model.config.num_key_value_heads if grouping == "head" else 1
        factor(model, LowRank(rank=options.rank // heads, grouping=grouping), moments)  # type: ignore[arg-type]
        if form.startswith("joint, heads"):
            found["union"] = union(model, ids)
        whole, latent = (run(model, config.replace(latents=latents), ids, options.answer) for latents in (False, True))
        found[form] = {
            "logits differ by": float((whole[0] - latent[0]).abs().max()),
            "held": [whole[1], latent[1]],
            "peak": [whole[2], latent[2]],
            "seconds a token": [whole[3], latent[3]],
        }
        print(form, found[form], flush=True)
    print(f"heads keep {RULE.top_k} of {RULE.lag_size} each, and {found['union']:.1f} together")
    about = {"torch": torch.__version__, "tokens": options.tokens, "answer": options.answer, "rank": options.rank}
    day = datetime.datetime.now(tz=datetime.UTC).date()
    (RESULTS / f"latent_cache_{day}_cpu.json").write_text(json.dumps(about | found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
