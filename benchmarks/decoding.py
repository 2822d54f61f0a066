"""How long does the next token take, with a compressed cache and with good dense decoding?

    python benchmarks/decoding.py [--parts layer model] [--batch 1 16] [--tokens 32768 131072] [--seconds 140]

The shape is Llama-3.2-1B's (32 query and 8 key-value heads, D=64), bf16, S=16 L=128; K is ``--top-k``. Parts:

- ``layer``: attention of one new token per row, which is written first, over 16 caches in turn as the layers of a model
  have them, in one CUDA graph; milliseconds of one layer. ``lrsa`` is the kernel of the decoder over what a row holds
  on average; ``compress_ms`` is its share of a compression. Dense forms over a static cache of just so many tokens,
  without a mask: SDPA's cuDNN and FlashAttention-2, with the query heads of a group as rows of one product
  (``folded``) or as grouped heads; ``flashinfer``, ``fa4``, where they are installed; and the decoder's kernel.
- ``model``: the whole step of a model with random weights, in a CUDA graph. LRSA's decoder, against the same model over
  dense keys and values by the best SDPA form, and by the decoder with all layers dense. ``--fuse`` compiles both too.

The dense model decodes one position again and again: it attends to just the past of that token, without a mask. Checks
first that each form gives what float64 attention gives, or the model's logits. Writes ``results/decoding.json``; rows
of the same commit, device and versions are not measured again, and none is begun after ``--seconds``.
``--device cpu`` tries it with a small model.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from decoding_forms import FORMS, Attend, StaticDense, draw_cache, grouped_truth
from random_model import per_token, random_model, random_tokens
from records import RESULTS, MissingError, Record, about
from timing import median
from torch import Tensor
from transformers import DynamicCache

from lrsa_lit.attention import LRSACache, LRSAConfig, prefill, using
from lrsa_lit.attention.decoding import Decoder
from lrsa_lit.ops.sparse_attention import Rule, stored_size
from lrsa_lit.ops.sparse_attention.api import implementation

KEYS = ("part", "who", "batch", "tokens", "top_k")
CALL = 32768
"""Tokens of a call that reads a prompt."""


def main(args: list[str] | None = None) -> int:
    started, options = time.perf_counter(), _parse(args)
    packages = ("transformers", "flashinfer-python", "flash-attn-4")
    record = Record(options.out / "decoding.json", about(*packages, device=options.device), KEYS)
    parts = {"layer": _layer_runs, "model": _model_runs}
    wanted = [
        (dict(zip(KEYS, (part, who, batch, tokens, options.top_k), strict=True)), run)
        for part, batch, tokens in itertools.product(options.parts, options.batch, options.tokens)
        for who, run in parts[part](batch, tokens, options)
    ]
    for row in record.measure(wanted, started + options.seconds):
        print(*(f"{name} {_shown(value)}" for name, value in row.items()), sep=", ", flush=True)
    return 0


def _parse(args: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=["layer", "model"], choices=["layer", "model"])
    parser.add_argument("--tokens", type=int, nargs="+", default=[32768, 131072])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--top-k", type=int, default=32)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--forms", nargs="+", default=list(FORMS), choices=FORMS)
    of_model = ["sdpa-flash-folded", "sdpa-cudnn-folded", "flashinfer"]
    parser.add_argument("--model-forms", nargs="+", default=of_model, choices=FORMS)
    parser.add_argument("--fuse", action="store_true", help="compile the model's other operations too")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=140, help="begin no row after so many")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--out", type=Path, default=RESULTS)
    return parser.parse_args(args)


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


Runs = Iterator[tuple[str, Callable[[], dict[str, Any]]]]


# One layer


def _layer_runs(batch: int, tokens: int, options: argparse.Namespace) -> Runs:
    yield "lrsa", functools.partial(_lrsa_layer, batch, tokens, options)
    for name in options.forms:
        yield f"dense, {name}", functools.partial(_dense_layer, name, batch, tokens, options)


def _shape(device: str) -> tuple[int, int, int]:
    """Hq, H, D."""
    return (32, 8, 64) if device == "cuda" else (4, 2, 16)


def _like(device: str) -> Tensor:
    return torch.empty(0, device=device, dtype=torch.bfloat16 if device == "cuda" else torch.float32)


@torch.no_grad()
def _steps(attend: Attend, batch: int, rows: int, options: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds of a layer whose cache has ``rows`` rows per head, the new token's included."""
    query_heads, heads, dim = _shape(options.device)
    like = _like(options.device)
    caches = [draw_cache(batch, heads, rows, dim, like) for _ in range(options.layers)]
    query, new = like.new_ones(batch, query_heads, 1, dim), like.new_ones(batch, heads, 1, dim)
    place = torch.tensor([rows - 1], device=like.device)

    def step() -> None:
        for key, value in caches:
            key.index_copy_(2, place, new)
            value.index_copy_(2, place, new)
            attend(query, key, value)

    ms = median(step, options.repeats, graphed=like.is_cuda) / options.layers
    read = 2 * batch * rows * heads * dim * like.element_size()
    return {"token_ms": ms, "rows": rows, "gb_per_s": read / ms * 1e-6}


@torch.no_grad()
def form_error(name: str, batch: int, device: str, rows: int = 257) -> float:
    """Relative difference of a form from float64."""
    query_heads, heads, dim = _shape(device)
    key, value = draw_cache(batch, heads, rows, dim, _like(device))
    query = torch.randn(batch, query_heads, 1, dim, device=device, dtype=key.dtype)
    output, truth = FORMS[name](device)(query, key, value), grouped_truth(query, key, value)
    return float((output - truth).norm() / truth.norm())


def _checked(name: str, batch: int, options: argparse.Namespace) -> Attend:
    if (error := form_error(name, batch, options.device)) > 0.01:
        raise MissingError(f"its relative error is {error:.3f}")
    return FORMS[name](options.device)


def _dense_layer(name: str, batch: int, tokens: int, options: argparse.Namespace) -> dict[str, Any]:
    return _steps(_checked(name, batch, options), batch, tokens + 1, options)


@torch.no_grad()
def _lrsa_layer(batch: int, tokens: int, options: argparse.Namespace) -> dict[str, Any]:
    rule, (_, heads, dim) = Rule(16, 128, options.top_k), _shape(options.device)
    rows = round(statistics.mean(stored_size(tokens + 1 + step, rule) for step in range(rule.lag_size)))
    found = _steps(_checked("decoder", batch, options), batch, rows, options)
    key, value = draw_cache(batch, heads, 2 * rule.lag_size, dim, _like(options.device))
    compress = implementation("auto", key).compress
    # One partition per row and L tokens; the decoder runs it between two graphs.
    ms = median(lambda: compress(key, value, rule, 1), 4 * options.repeats, graphed=False)
    return found | {"compress_ms": ms / rule.lag_size}


# The whole model


def _model_runs(batch: int, tokens: int, options: argparse.Namespace) -> Runs:
    rule = LRSAConfig(sink_size=16, lag_size=128, top_k=options.top_k)
    dense = rule.replace(dense_layers=tuple(range(options.layers)))
    for fuse in (False, True) if options.fuse else (False,):
        more = ", fused" if fuse else ""
        yield f"lrsa{more}", functools.partial(_decoded, rule, batch, tokens, fuse, options)
        for name in options.model_forms:
            yield f"dense, {name}{more}", functools.partial(_static, name, batch, tokens, fuse, options)
        yield f"dense, lrsa's decoder{more}", functools.partial(_decoded, dense, batch, tokens, fuse, options)


_model = functools.cache(random_model)


@torch.no_grad()
def _decoded(rule: LRSAConfig, batch: int, tokens: int, fuse: bool, options: argparse.Namespace) -> dict[str, Any]:
    """The step of the decoder behind equal rows."""
    model = _model(options.layers, options.device)
    ids = random_tokens(model, tokens)
    with using(model, rule):
        cache = LRSACache.of(model)
        prefill(model, ids, cache, tokens_per_call=CALL)
        cache.batch_repeat_interleave(batch)
        decoder = Decoder(model, cache, fuse=fuse)
        ms = per_token(decoder.step, ids[:, -1:].repeat(batch, 1))
        return {"token_ms": ms, "cache_mib": cache.nbytes / 2**20}


@torch.no_grad()
def _static(name: str, batch: int, tokens: int, fuse: bool, options: argparse.Namespace) -> dict[str, Any]:
    model = _model(options.layers, options.device)
    if (error := static_error(model, name)) > 0.05:
        raise MissingError(f"its logits differ by {error:.3f} from the model's")
    shape = batch, model.config.num_key_value_heads, tokens + 1, model.config.head_dim
    pairs = [draw_cache(*shape, model.lm_head.weight) for _ in range(options.layers)]
    with StaticDense(model, name, pairs, fuse=fuse) as step:
        ms = per_token(step, random_tokens(model, 1, batch))
    return {"token_ms": ms, "cache_mib": sum(part.nbytes for pair in pairs for part in pair) / 2**20}


@torch.no_grad()
def static_error(model: Any, name: str, tokens: int = 300) -> float:
    """Relative difference of the static form's logits from those of the model over all tokens."""
    ids, cache = random_tokens(model, tokens), DynamicCache()
    truth = model(ids, past_key_values=cache, logits_to_keep=1).logits
    pairs = []
    for layer in cache.layers:
        pair = draw_cache(1, *layer.keys.shape[1:], layer.keys)
        for part, filled in zip(pair, (layer.keys, layer.values), strict=True):
            part.copy_(filled)
            # The last token's pair is written by the step.
            part[:, :, -1] = float("nan")
        pairs.append(pair)
    with StaticDense(model, name, pairs) as step:
        logits = step(ids[:, -1:])
    return float((logits - truth).norm() / truth.norm())


if __name__ == "__main__":
    sys.exit(main())
