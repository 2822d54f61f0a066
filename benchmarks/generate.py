"""What does the compressed cache save when a model reads and answers?

Run ``python benchmarks/generate.py`` on a CUDA device.
A model of Llama-3.2-1B's shape with random weights, bf16, batch 1. Beside LRSA (L=128, K=16) the same model with sdpa
and a DynamicCache, and, where they are installed, transformers' QuantizedCache and kvpress' LagKVPress (dense prefill,
compressed afterwards). Checks first that chunked reading and single-token steps give the logits of the parallel pass.
Writes ``results/generate.json`` and ``generate.png``. The time of a token is ``decoding.py``'s.

Parts: ``prefill`` (time to the first token and memory of the cache), ``million``
(1,048,576 tokens read chunk by chunk, the dense model up to ``--dense-tokens`` and extrapolated), ``answers`` (batches
of prompts of unequal lengths, read and answered by ``model.generate`` as an evaluation does). Parts add to the same
files.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from random_model import per_token, random_model, random_tokens
from records import RESULTS, about
from torch import Tensor
from transformers import DynamicCache

from lrsa_lit.attention import LRSACache, LRSAConfig, graphed_decoding, prefill, using
from lrsa_lit.attention.decoding import Decoder

RULE = LRSAConfig(sink_size=16, lag_size=128, top_k=16)
PROMPT, ANSWER = 4096, 24
"""Tokens of the longest prompt of a batch that is answered, and of each answer."""
Cell = dict[str, Any]


def main(args: list[str] | None = None) -> int:
    options = _parse(args)
    model = random_model(options.layers)
    if not _gate(model):
        print("correctness gate: RED")
        return 1
    print("correctness gate: green")
    path = options.out / "generate.json"
    options.out.mkdir(parents=True, exist_ok=True)
    record: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"rows": []}
    record |= about("transformers")
    record |= {
        "dtype": "bfloat16",
        "model": f"Llama-3.2-1B shape, {options.layers} layers, random weights",
        "rule": str(RULE),
    }
    parts = {"prefill": _prefill_rows, "million": _million_rows, "answers": _answer_rows}
    for part in options.parts:
        for row in parts[part](model, options):
            print(json.dumps({"part": part, **row}), flush=True)
            same = [old for old in record["rows"] if _key(old) == _key({"part": part, **row})]
            record["rows"] = [old for old in record["rows"] if old not in same] + [{"part": part, **row}]
            path.write_text(json.dumps(record, indent=1) + "\n")
    _summary(record["rows"])
    _plot(record, options.out / "generate.png")
    return 0


def _parse(args: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=["prefill", "million", "answers"])
    parser.add_argument("--tokens", type=int, nargs="+", default=[32768, 131072])
    parser.add_argument("--million", type=int, default=1 << 20, help="tokens of the last part")
    parser.add_argument("--dense-tokens", type=int, default=1 << 18, help="tokens that the dense model reads there")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--peers", nargs="*", default=["quantized", "kvpress"])
    parser.add_argument("--out", type=Path, default=RESULTS)
    return parser.parse_args(args)


@torch.no_grad()
def _gate(model: Any) -> bool:
    """Next tokens of the parallel pass, of reading in chunks and of graphed steps agree as dense ones do."""
    ids, shares = random_tokens(model, 3000), []
    for rule in (None, RULE):
        with using(model, rule):
            whole = model(ids, use_cache=False).logits[0]
            cache = DynamicCache() if rule is None else LRSACache.of(model)
            chunks = [model(ids[:, at : at + 500], past_key_values=cache).logits[0] for at in range(0, 2900, 500)]
            shares.append(_agreement(whole, torch.cat(chunks)))
            if rule is not None:
                cache = LRSACache.of(model)
                prefill(model, ids[:, :2800], cache)
                decoder = Decoder(model, cache)
                steps = torch.cat([decoder.step(ids[:, at, None])[0].clone() for at in range(2800, 3000)])
                near = (steps.float() - whole[2800:].float()).norm() / whole[2800:].float().norm()
    print(f"same next token, chunks and parallel: dense {shares[0]:.4f}, LRSA {shares[1]:.4f}; steps differ {near:.4f}")
    return shares[1] >= shares[0] - 0.01 and bool(near < 0.05)


def _agreement(first: Tensor, second: Tensor) -> float:
    return float((first.argmax(-1) == second.argmax(-1)).float().mean())


def _prefill_rows(model: Any, options: argparse.Namespace) -> Iterator[Cell]:
    for length in options.tokens:
        ids = random_tokens(model, length)
        with using(model, RULE):
            yield {"who": "lrsa", "tokens": length, **_read(model, ids, lambda: LRSACache.of(model), options.repeats)}
        yield {"who": "dense", "tokens": length, **_read(model, ids, DynamicCache, options.repeats)}
        if "quantized" in options.peers:
            yield {
                "who": "quantized",
                "tokens": length,
                **_tried(lambda ids=ids: _read(model, ids, _quantized(model), 1)),
            }
        if "kvpress" in options.peers:
            yield {"who": "kvpress", "tokens": length, **_tried(lambda ids=ids: _kvpress(model, ids))}


def _read(model: Any, ids: Tensor, make: Callable[[], Any], repeats: int) -> Cell:
    """Seconds to the first token, read in one call, and memory of the cache."""
    times = []
    for _ in range(repeats + 1):
        torch.cuda.synchronize()
        start = time.perf_counter()
        cache = make()
        prefill(model, ids, cache, tokens_per_call=ids.shape[1]).argmax(-1).item()
        times.append(time.perf_counter() - start)
    return {"first_token_s": statistics.median(times[1:]), "cache_mib": _cache_bytes(cache) / 2**20}


def _cache_bytes(cache: Any) -> int:
    """Memory behind the keys and values, spare rows included."""
    if isinstance(cache, LRSACache):
        return sum(part.untyped_storage().nbytes() for layer in cache.layers for part in layer.streams[0].buffer.whole)
    return sum(part.untyped_storage().nbytes() for layer in cache.layers for part in (layer.keys, layer.values))


def _quantized(model: Any) -> Callable[[], Any]:
    from transformers import QuantizedCache

    return lambda: QuantizedCache("quanto", model.config)


def _kvpress(model: Any, ids: Tensor) -> Cell:
    from kvpress import LagKVPress

    press = LagKVPress(compression_ratio=1 - RULE.top_k / RULE.lag_size, n_sink=RULE.sink_size, lag_size=RULE.lag_size)
    with press(model):
        return _read(model, ids, DynamicCache, 1)


def _tried(run: Callable[[], Cell]) -> Cell:
    try:
        return run()
    except Exception as error:
        return {"failed": f"{type(error).__name__}: {str(error).splitlines()[0][:120] if str(error) else ''}"}


@torch.no_grad()
def _million_rows(model: Any, options: argparse.Namespace) -> Iterator[Cell]:
    weights = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    ids = random_tokens(model, options.million)
    with using(model, RULE):
        cache, seconds = LRSACache.of(model), []
        seconds = _chunked(model, ids, cache, 32768)
        decoder = Decoder(model, cache)
        ms = per_token(decoder.step, ids[:, -1:])
        yield {"who": "lrsa", "tokens": options.million, "read_s": seconds[-1][1], "token_ms": ms,
               "peak_gib": (torch.cuda.max_memory_allocated() - weights) / 2**30, "curve": seconds}  # fmt: skip
        del cache, decoder
    for who, rule in (
        ("dense, sdpa", None),
        ("dense, our kernel", RULE.replace(dense_layers=tuple(range(options.layers)))),
    ):
        torch.cuda.reset_peak_memory_stats()
        with using(model, rule):
            cache = DynamicCache() if rule is None else LRSACache.of(model)
            # A mask of 8,192 queries is what sdpa needs over a past; more would not fit.
            curve = _chunked(model, ids[:, : options.dense_tokens], cache, 8192 if rule is None else 32768)
        yield {"who": who, "tokens": curve[-1][0], "read_s": curve[-1][1], "curve": curve,
               "extrapolated_s": _extrapolated(curve, options.million),
               "peak_gib": (torch.cuda.max_memory_allocated() - weights) / 2**30}  # fmt: skip


def _answer_rows(model: Any, options: argparse.Namespace) -> Iterator[Cell]:
    for rows in (1, 8):
        lengths = torch.linspace(PROMPT * 7 // 8, PROMPT, rows).flip(0).long()
        mask = (torch.arange(PROMPT) >= PROMPT - lengths[:, None]).long().cuda()
        ids = random_tokens(model, PROMPT).repeat(rows, 1)
        with using(model, RULE):
            for who, graphed in (("launched", False), ("graph", True)):
                seconds = _answered(model, ids, mask, graphed, options.repeats)
                yield {"who": f"lrsa, {who}, {rows} prompts", "tokens": PROMPT, "questions_per_s": rows / seconds}


def _answered(model: Any, ids: Tensor, mask: Tensor, graphed: bool, repeats: int) -> float:
    """Seconds to read and answer a batch, each time with a cache of its own."""
    times = []
    for _ in range(repeats + 1):
        torch.cuda.synchronize()
        start = time.perf_counter()
        cache = LRSACache.of(model)
        with graphed_decoding(model, cache, room=ANSWER) if graphed else contextlib.nullcontext():
            model.generate(
                ids, attention_mask=mask, past_key_values=cache, do_sample=False, pad_token_id=0, eos_token_id=None,
                max_new_tokens=ANSWER, min_new_tokens=ANSWER,
            )  # fmt: skip
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def _chunked(model: Any, ids: Tensor, cache: Any, size: int) -> list[tuple[int, float]]:
    """Tokens read and seconds since the start, after each call."""
    torch.cuda.synchronize()
    start, curve = time.perf_counter(), []

    def note(count: int) -> None:
        torch.cuda.synchronize()
        curve.append((count, time.perf_counter() - start))

    prefill(model, ids, cache, tokens_per_call=size, progress=note)
    return curve


def _extrapolated(curve: list[tuple[int, float]], tokens: int) -> float:
    """Seconds for more tokens by a least-squares parabola: linear layers and attention, without what the start took."""
    count = torch.tensor([point[0] for point in curve], dtype=torch.float64)
    seconds = torch.tensor([point[1] for point in curve], dtype=torch.float64)
    terms = torch.stack([torch.ones_like(count), count, count.square()], dim=1)
    _, linear, quadratic = torch.linalg.lstsq(terms, seconds[:, None]).solution[:, 0].tolist()
    return float(linear * tokens + quadratic * tokens**2)


def _key(row: Cell) -> tuple[Any, ...]:
    return row["part"], row["who"], row["tokens"]


def _summary(rows: list[Cell]) -> None:
    """The comparisons that matter, one line each."""
    by = {_key(row): row for row in rows}
    for length in sorted({row["tokens"] for row in rows}):
        ours, dense = by.get(("prefill", "lrsa", length)), by.get(("prefill", "dense", length))
        if ours and dense:
            print(f"{length} tokens: first token {dense['first_token_s'] / ours['first_token_s']:.2f}x faster,",
                  f"cache 1/{dense['cache_mib'] / ours['cache_mib']:.2f}")  # fmt: skip
    for row in rows:
        if row["part"] == "answers":
            print(f"{row['who']}: {row['questions_per_s']:.2f} questions a second")
        if row["part"] == "million":
            extra = f", extrapolated {row['extrapolated_s']:.0f} s" if "extrapolated_s" in row else ""
            print(
                f"{row['who']}: {row['tokens']} tokens in {row['read_s']:.1f} s{extra}, peak {row['peak_gib']:.1f} GiB"
            )


def _plot(record: dict[str, Any], path: Path) -> None:
    """Seconds to read, over tokens."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    for row in record["rows"]:
        if "curve" in row:
            axes.plot(*zip(*row["curve"], strict=True), label=row["who"])
    axes.set(xscale="log", yscale="log", xlabel="tokens read", ylabel="seconds")
    axes.set_title(f"{record['device']}, {record['model']},\nbf16, read chunk by chunk")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    sys.exit(main())
