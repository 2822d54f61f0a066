"""Next-token loss of a model whose keys and values have a low rank, on the CPU in float32: plain, whitened, by head.

    python benchmarks/low_rank.py [--ranks 160 128 96 64] [--fitted 8 --fitted-tokens 512] [--contexts 2 --tokens 384]
    python benchmarks/low_rank.py --checkpoints CKPT ... [--contexts 2 --tokens 384]

SmolLM2-135M on HotpotQA's contexts. Whitening is by the moments of the first contexts of the training split; the loss
is that of the first contexts of the validation split, which share no question with them. Ranks are those of a layer's
keys, and of its values; a head of ``head`` has the rank / H. Prints each loss, and writes
``results/low_rank_DATE_cpu.json``. Of checkpoints it prints the loss alone, and the mean rank of those with factors.
"""

from __future__ import annotations

import argparse
import datetime
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from lrsa_lit.attention.low_rank_linear import LowRankLinear
from lrsa_lit.data import HotpotQA
from lrsa_lit.data.module import Split
from lrsa_lit.models import Backbone, LowRank, whitening
from lrsa_lit.models.checkpoint import load_trained
from lrsa_lit.models.factors import factor
from lrsa_lit.paths import shipped
from lrsa_lit.yaml_file import read_settings

RESULTS = Path(__file__).parent / "results"
FORMS: dict[str, tuple[bool, dict[str, Any]]] = {
    "plain, uniform": (False, {}),
    "plain, progressive": (False, {"schedule": "progressive"}),
    "plain, head": (False, {"grouping": "head"}),
    "whitened, uniform": (True, {}),
    "whitened, progressive": (True, {"schedule": "progressive"}),
    "whitened, head": (True, {"grouping": "head"}),
}
"""Whether it is whitened, and its other settings."""


def contexts(data: HotpotQA, split: Split, count: int, tokens: int) -> list[list[int]]:
    """The first tokens of the first prompts of a split."""
    data.prepare_split(split)
    examples = data.open_split(split)
    return [examples[index]["input_ids"][:tokens] for index in range(count)]


@torch.no_grad()
def loss(model: Any, texts: Sequence[Sequence[int]]) -> float:
    """Mean over all tokens that have a predecessor."""
    total, count = 0.0, 0
    for text in texts:
        ids = torch.tensor([list(text)])
        total += cross_entropy(model(input_ids=ids).logits[0, :-1], ids[0, 1:], reduction="sum").item()
        count += len(text) - 1
    return total / count


def main() -> None:
    """Measure each form at each rank."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[160, 128, 96, 64])
    for name, default in (("fitted", 8), ("fitted-tokens", 512), ("contexts", 2), ("tokens", 384)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--checkpoints", nargs="+", type=Path, default=[])
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS))
    options = parser.parse_args()
    backbone = Backbone(**read_settings(shipped("configs/model/smollm2.yaml"))["model"]["backbone"])
    data = HotpotQA(tokenizer=backbone.tokenizer, max_tokens=4096)
    judged = contexts(data, "val", options.contexts, options.tokens)
    for path in options.checkpoints:
        trained: Any = load_trained(path, "float32").build().eval()
        ranks = [sum(each.ranks) for each in trained.modules() if isinstance(each, LowRankLinear)]
        of = f", mean rank {sum(ranks) / len(ranks):.1f}" if ranks else ""
        print(f"{path}: {loss(trained, judged):.3f}{of}", flush=True)
    if options.checkpoints:
        return
    read = contexts(data, "train", options.fitted, options.fitted_tokens)
    dense = backbone.build()
    heads, found = dense.config.num_key_value_heads, {"dense": {"": loss(dense.eval(), judged)}}
    print(f"dense {found['dense']['']:.3f}", flush=True)
    moments = whitening.measure(dense, read)
    for form in options.forms:
        whitened, settings = FORMS[form]
        for rank in options.ranks:
            model: Any = backbone.build().eval()
            rank_of_block = rank // heads if settings.get("grouping") == "head" else rank
            factor(model, LowRank(rank=rank_of_block, **settings), moments if whitened else None)
            found.setdefault(form, {})[str(rank)] = loss(model, judged)
            print(f"{form} {rank}: {found[form][str(rank)]:.3f}", flush=True)
    day = datetime.datetime.now(tz=datetime.UTC).date()
    about = {name: getattr(options, name) for name in ("fitted", "fitted_tokens", "contexts", "tokens")}
    record = {"torch": torch.__version__, **about, "loss": found}
    (RESULTS / f"low_rank_{day}_cpu.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
