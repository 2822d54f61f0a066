"""How long each published system takes to read a prompt and to answer, and what it holds, beside the rule and dense.

    python benchmarks/system_costs.py [--tokens 32768] [--budget 0.25] [--systems Cascade SqueezedAttention]

A model of Llama-3.2-1B's shape with random weights in bfloat16, batch 1, read and answered as an evaluation does. Each
system that has a size is set to the budget there. Prints a table and writes ``results/system_costs_DATE_DEVICE.json``.
"""

from __future__ import annotations

import argparse
import datetime
import json
from pathlib import Path

import torch
import transformers
import triton
from transformers import AutoModelForCausalLM, LlamaConfig

from lrsa_lit import plugins
from lrsa_lit.attention import LRSAConfig, at_budget, head_of, using
from lrsa_lit.attention.decoding import Greedy
from lrsa_lit.attention.measured import shares
from lrsa_lit.errors import UserError

HERE = Path(__file__).parent
RULE = LRSAConfig(sink_size=16, lag_size=128, top_k=32)
MiB = 1 << 20


def attentions(names: list[str], budget: float, tokens: int, config: LlamaConfig) -> dict[str, LRSAConfig]:
    """By name; what cannot be set to the budget is told and left out."""
    layers, head = config.num_hidden_layers, head_of(config, 2)
    found = {
        "dense": RULE.replace(dense_layers=tuple(range(layers))),
        "LRSA": at_budget(RULE, budget, tokens, layers, head),
    }
    for name, system in plugins.registered("systems").items():
        if names and name not in names:
            continue
        try:
            config_of = RULE.replace(system={"class_path": f"{system.__module__}.{name}", "init_args": {}})
            sized = config_of.system is not None and config_of.system.budget_field
            found[name] = at_budget(config_of, budget, tokens, layers, head) if sized else config_of
        except UserError as error:
            print(f"{name} is left out: {error}", flush=True)
    return found


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llama-3.2-1b", help="a folder of shapes/")
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--budget", type=float, default=0.25)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--systems", nargs="*", default=[])
    parser.add_argument("--out", type=Path, default=HERE / "results")
    options = parser.parse_args()
    config = LlamaConfig.from_pretrained(HERE / "shapes" / options.shape)
    config.max_position_embeddings = max(config.max_position_embeddings, options.tokens + options.new_tokens)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    device_name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    ids = torch.randint(config.vocab_size, (1, options.tokens), generator=torch.Generator().manual_seed(1)).to(device)
    about = {"date": datetime.date.today().isoformat(), "device": device_name, "dtype": "bfloat16"}
    versions = {"torch": torch.__version__, "triton": triton.__version__, "transformers": transformers.__version__}
    asked = {"shape": options.shape, "tokens": options.tokens, "budget": options.budget, "rule": str(RULE)}
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"system_costs_{about['date']}_{about['device'].split()[-1].lower()}.json"
    rows = []
    for name, rule in attentions(options.systems, options.budget, options.tokens, config).items():
        if device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        try:
            with using(model, rule):
                greedy = Greedy(
                    model,
                    (),
                    max_new_tokens=options.new_tokens,
                    longest_prompt=options.tokens,
                    # Of KVzip's instructions: there is no tokenizer.
                    encode=lambda text: list(text.encode()),
                )
                # The first run compiles and captures.
                usages = [(greedy(ids), greedy.usage)[1] for _ in range(options.repeats + 1)][1:]
                graphed = all(cache.graphable for cache, _ in greedy._caches.values())
            del greedy
        except torch.OutOfMemoryError:
            print(f"{name}: out of memory", flush=True)
            continue
        row = {"system": name, **shares([usage for usage in usages if usage]), "graphed": graphed}
        row["allocated_mib"] = (torch.cuda.max_memory_allocated() - before) / MiB
        rows.append(row)
        print(
            f"{name:20} cache {row['cache']:.3f}  first token {row['first_token_seconds']:.3f} s"
            f"  token {1e3 * row['token_seconds']:.2f} ms  peak {row['allocated_mib']:,.0f} MiB"
            f"  {'graph' if graphed else ''}",
            flush=True,
        )
        # A run that is stopped has what it has measured.
        path.write_text(json.dumps({**about, **versions, **asked, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
