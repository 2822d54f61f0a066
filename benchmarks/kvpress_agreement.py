"""Do kvpress's presses and this project's systems keep the same pairs, and does a model then say the same?

Run ``python benchmarks/kvpress_agreement.py --kvpress-python /path/to/python``, an interpreter of an environment with
kvpress 0.5.5, which needs another transformers than this project (``kvpress_peer.py`` runs there). A small random Llama
reads random tokens and SmolLM2-135M the licence, prompts of some lengths, in float32 on a CPU. Compared are the kept
positions of each layer and KV head, and the logits of the next tokens behind the cut. Where other positions stay, their
scores must be equal up to rounding (a token that comes twice has one key norm in the first layer), and the logits are
those behind kvpress's choice. LRSA's rule is held to kvpress's LagKV at the budget at which both keep K of each
partition, on the keys of a dense pass.
Prints a line per case, writes ``results/kvpress.json`` (``--out``), and exits with 1 if any differs.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import functools
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
import yaml
from torch import Tensor
from transformers import DynamicCache

from lrsa_lit import systems
from lrsa_lit.attention import LRSACache, LRSAConfig, end_prompt, prefill, using
from lrsa_lit.models import Backbone
from lrsa_lit.models.tiny import tiny_model, tiny_tokenizer
from lrsa_lit.ops.sparse_attention import Rule, select
from lrsa_lit.paths import shipped
from lrsa_lit.systems import System, one_shot
from lrsa_lit.systems.system import Encode

HERE = Path(__file__).parent
ANSWER, TOLERANCE, TIE = 8, 1e-4, 1e-6
LAG = {"n_sink": 4, "lag_size": 32}


@dataclass(frozen=True)
class Case:
    """A prompt's length, the share removed of it, a press, and what is held to it; None: nothing is cut."""

    name: str
    tokens: int
    removed: float
    press: dict[str, Any] | None = None
    ours: Any = None

    @property
    def dense(self) -> Case:
        return Case("dense", self.tokens, 0)

    @property
    def label(self) -> str:
        return f"{self.name}, {self.tokens} tokens, {self.removed:.4g} removed"


def main(args: list[str] | None = None) -> int:
    options = _parse(args)
    record: dict[str, Any] = {"date": datetime.date.today().isoformat(), "torch": torch.__version__, "device": "cpu"}
    record |= {"transformers": transformers.__version__, "dtype": options.dtype, "answer": ANSWER, "rows": []}
    for name in options.models:
        model, tokenizer, ids = _model(name, options)
        encode = functools.partial(tokenizer.encode, add_special_tokens=False)
        compared = list(cases(options.tokens))
        theirs = _peer(model, tokenizer, ids, compared, options)
        record["peer"] = theirs["versions"].tolist()
        for case in compared:
            row = {"model": name, "case": case.label, **_compared(model, ids, case, theirs, encode)}
            record["rows"].append(row)
            print(json.dumps(row), flush=True)
    options.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    bad = [row for row in record["rows"] if row["gap"] > TIE or row.get("logits", 0) > TOLERANCE]
    print(f"{len(record['rows']) - len(bad)} of {len(record['rows'])} cases agree")
    return 1 if bad else 0


def _parse(args: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kvpress-python", required=True, help="the interpreter of kvpress's environment")
    parser.add_argument("--models", nargs="+", choices=["tiny", "smollm2"], default=["tiny", "smollm2"])
    parser.add_argument("--text", type=Path, default=HERE.parent / "LICENSE", help="what SmolLM2 reads")
    parser.add_argument("--tokens", type=int, nargs="+", default=[300, 800], help="lengths of the prompts")
    parser.add_argument("--dtype", choices=["float32", "float64"], default="float32")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "kvpress.json")
    return parser.parse_args(args)


def cases(lengths: list[int]) -> Iterator[Case]:
    """Each press and system to compare, at prompts of these lengths, with a half and three quarters removed."""
    for tokens in lengths:
        yield Case("", tokens, 0).dense
        for removed in (0.5, 0.75):
            for name, press, ours in _pairs(removed):
                yield Case(name, tokens, removed, press, ours)
            # Ranks tie across partitions: only a budget of whole K leaves nothing to how a sort breaks ties.
            sink, lag = LAG["n_sink"], LAG["lag_size"]
            partitions = (tokens - sink) // lag - 1
            raw = tokens - partitions * lag
            top_k = (int(tokens * (1 - removed)) - raw) // partitions
            share = (raw + top_k * partitions + 0.5) / tokens
            press = _press("LagKVPress", 1 - share, **LAG)
            yield Case("LagKV", tokens, 1 - share, press, systems.LagKVPress(share, sink_size=sink, lag_size=lag))
            yield Case("LagKV, LRSA's rule", tokens, 1 - share, press, Rule(sink, lag, top_k))


def _pairs(removed: float) -> Iterator[tuple[str, dict[str, Any], System]]:
    kept = 1 - removed
    snap, expected = _press("SnapKVPress", removed), _press("ExpectedAttentionPress", removed, epsilon=0.01)
    cross = {"sink_size": LAG["n_sink"], "lag_size": LAG["lag_size"], "cross_scoring": True}
    yield "SnapKV", snap, systems.SnapKV(kept)
    yield "TOVA", _press("TOVAPress", removed), systems.TOVA(kept)
    yield "KeyDiff", _press("KeyDiffPress", removed), systems.KeyDiff(kept)
    yield "key norm", _press("KnormPress", removed), systems.KeyNorm(kept)
    yield "StreamingLLM", _press("StreamingLLMPress", removed), systems.StreamingLLM(kept)
    yield "Expected Attention", expected, systems.ExpectedAttention(kept, epsilon=0.01)
    yield "ChunkKV", {"class": "ChunkKVPress", "init": {"press": snap}}, systems.ChunkKVPress(kept)
    yield "LagKV across", _press("LagKVPress", removed, **LAG, cross_scoring=True), systems.LagKVPress(kept, **cross)
    # There sinks are repeated as well, so there are none here. The suffix is kvpress's where it has no chat template.
    yield "KVzip", _press("KVzipPress", removed, n_sink=0), systems.KVzip(kept, sink_size=0)
    expecting = systems.ExpectedAttention(epsilon=0.01)
    for name, press, scorer in (("SnapKV", snap, systems.SnapKV()), ("Expected Attention", expected, expecting)):
        yield f"AdaKV, {name}", {"class": "AdaKVPress", "init": {"press": press}}, systems.AdaKV(kept, scorer=scorer)


def _press(name: str, removed: float, **init: Any) -> dict[str, Any]:
    return {"class": name, "init": {"compression_ratio": removed, **init}}


def _model(name: str, options: argparse.Namespace) -> tuple[Any, Any, list[int]]:
    """A model, its tokenizer without a chat template, and the tokens that it reads."""
    length = max(options.tokens) + ANSWER
    if name == "tiny":
        model, tokenizer = tiny_model(num_layers=3), tiny_tokenizer()
        ids = torch.randint(3, model.config.vocab_size, (length,), generator=torch.Generator().manual_seed(0)).tolist()
    else:
        backbone = Backbone(**yaml.safe_load(shipped("configs/model/smollm2.yaml").read_text())["model"]["backbone"])
        model, tokenizer = backbone.build(), copy.copy(backbone.tokenizer)
        ids = tokenizer(options.text.read_text(encoding="utf-8"), verbose=False)["input_ids"][:length]
    tokenizer.chat_template = None
    return model.to(getattr(torch, options.dtype)).eval(), tokenizer, ids


def _peer(model: Any, tokenizer: Any, ids: list[int], cases: list[Case], options: argparse.Namespace) -> Any:
    """What kvpress makes of the cases, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        job, out = Path(folder, "job.json"), Path(folder, "out.npz")
        model.save_pretrained(Path(folder, "model"))
        tokenizer.save_pretrained(Path(folder, "model"))
        asked = [{"name": case.label, "tokens": case.tokens, "press": case.press} for case in cases]
        facts = {"model": str(Path(folder, "model")), "dtype": options.dtype, "ids": ids, "answer": ANSWER}
        job.write_text(json.dumps({**facts, "cases": asked}), encoding="utf-8")
        subprocess.run([options.kvpress_python, HERE / "kvpress_peer.py", job, out], check=True)
        return dict(np.load(out))


@torch.no_grad()
def _compared(model: Any, ids: list[int], case: Case, theirs: Any, encode: Encode) -> dict[str, Any]:
    """How many heads keep other pairs, how far apart the scores of these are, and the largest difference of logits."""
    expected, scores = (torch.from_numpy(theirs[f"{case.label}/{name}"]) for name in ("kept", "scores"))
    rule = case.ours if isinstance(case.ours, Rule) else None
    kept, logits = (_kept_by_rule(model, ids[: case.tokens], rule), None) if rule else _run(model, ids, case, encode)
    other = kept != expected
    # Each head chooses for itself, but the heads of a layer compete in AdaKV, and all in KVzip.
    rivals = {systems.KVzip: 1, systems.AdaKV: len(other)}.get(type(case.ours), other[..., 0].numel())
    groups = zip(scores.reshape(rivals, -1), other.reshape(rivals, -1), strict=True)
    swapped = [of_group[at] for of_group, at in groups if at.any()]
    gap = max((float((each.max() - each.min()) / each.abs().max()) for each in swapped), default=0.0)
    row = {"pairs": expected.sum() / expected[..., 0].numel(), "heads": expected[..., 0].numel()}
    row |= {"different_heads": other.any(-1).sum(), "gap": gap}
    if logits is not None:
        if swapped and gap <= TIE:
            logits = _run(model, ids, case, encode, expected)[1]
        there, dense = (torch.from_numpy(theirs[f"{name}/logits"]) for name in (case.label, case.dense.label))
        row |= {"logits": (logits - there).abs().max(), "from_dense": (logits - dense).abs().max()}
    return {name: round(float(value), 8) for name, value in row.items()}


def _run(model: Any, ids: list[int], case: Case, encode: Encode, cut: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Kept positions (layers, H, T) bool, and the logits (answer, V) behind them, or behind another ``cut``."""
    tokens, dense = torch.tensor([ids]), case.ours is None
    kept = torch.ones(model.config.num_hidden_layers, model.config.num_key_value_heads, case.tokens, dtype=torch.bool)
    with using(model, None if dense else LRSAConfig(system=case.ours)):
        cache = DynamicCache() if dense else LRSACache.of(model)
        prefill(model, tokens[:, : case.tokens], cache)
        if isinstance(cache, LRSACache):
            for layer, positions in zip(cache.layers, [] if cut is None else cut, strict=cut is not None):
                one_shot.cut([(layer.streams, _positions(positions)[None])])
            end_prompt(model, cache, tokens[:, : case.tokens], encode=encode)
            kept = torch.stack([_mask(layer.streams[0].kept, case.tokens) for layer in cache.layers])
        answer = range(case.tokens, case.tokens + ANSWER)
        logits = [model(tokens[:, place : place + 1], past_key_values=cache).logits[0, -1] for place in answer]
    return kept, torch.stack(logits)


def _mask(kept: Tensor, tokens: int) -> Tensor:
    """(H, T) bool of positions (1, H, n), of which -1 is none."""
    places = kept[0].where(kept[0] >= 0, tokens)
    return torch.zeros(len(places), tokens + 1, dtype=torch.bool).scatter(1, places, True)[:, :tokens]


def _positions(mask: Tensor) -> Tensor:
    """The way back: (H, most of a head)."""
    tokens = mask.shape[1]
    places = torch.arange(tokens).where(mask, tokens).sort(dim=1).values[:, : int(mask.sum(dim=1).max())]
    return places.masked_fill(places == tokens, -1)


def _kept_by_rule(model: Any, ids: list[int], rule: Rule) -> Tensor:
    """(layers, H, T) bool: what the rule keeps of the keys and values of a dense pass."""
    cache = DynamicCache()
    model(torch.tensor([ids]), past_key_values=cache)
    masks = []
    for layer in cache.layers:
        kept = select(layer.keys, layer.values, rule).indices[0]
        mask = torch.ones(*layer.keys.shape[1:3], dtype=torch.bool)
        mask[:, rule.sink_size : rule.sink_size + kept.shape[1] * rule.lag_size] = False
        masks.append(mask.scatter(1, kept.flatten(1), True))
    return torch.stack(masks)


if __name__ == "__main__":
    sys.exit(main())
