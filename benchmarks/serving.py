"""Requests a second and waiting times of ``lrsa serve``, with LRSA and with dense caches in equal memory.

    python benchmarks/serving.py --model MODEL [--clients 1 8 32 128] [--tokens 8192] [--new 128] [--memory 8]

Each server is the command itself, in a process of its own. So many clients at a time ask, one request after the other;
a document of about ``--tokens`` tokens goes before each question. Fresh documents differ from request to request;
cached ones are a few that were read before the clock starts. Answers are greedy, of ``--new`` tokens at most, and
streamed: the first token is the first piece of text that arrives, and the time per token is that of the rest. Prints a
JSON line for each cell, and writes all of them with ``--out``.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import datetime
import importlib.metadata
import itertools
import json
import platform
import random
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

WORDS = [
    "river",
    "lake",
    "town",
    "road",
    "bridge",
    "tower",
    "garden",
    "market",
    "harbour",
    "castle",
    "forest",
    "island",
    "valley",
    "mill",
    "station",
    "school",
]
_CACHED_DOCUMENTS = 4


class Timing(NamedTuple):
    """Seconds of one request, and what came of it."""

    first: float
    per_token: float | None
    tokens: int
    cached: int


def main() -> None:
    """Measure and print."""
    options = _parse()
    cells: list[dict[str, Any]] = []
    packages = ("torch", "transformers", "litserve", "openai")
    versions = {name: importlib.metadata.version(name) for name in packages}
    facts = {"date": str(datetime.date.today()), "machine": _machine(), "model": options.model, **versions}
    print(json.dumps(facts), flush=True)
    for kind in options.kinds:
        flags = ["--dense"] if kind == "dense" else options.rule
        with _server(options, flags) as port:
            for cached, clients in itertools.product((False, True), options.clients):
                cell = {"kind": kind, "cached": cached, "clients": clients} | _measured(options, port, clients, cached)
                cells.append(cell)
                print(json.dumps(cell), flush=True)
    if options.out:
        Path(options.out).write_text(json.dumps({**facts, "command": sys.argv[1:], "cells": cells}, indent=1) + "\n")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--kinds", nargs="+", choices=("lrsa", "dense"), default=["lrsa", "dense"])
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32, 128])
    parser.add_argument("--tokens", type=int, default=8192, help="of a document, about")
    parser.add_argument("--new", type=int, default=128, help="most tokens of an answer")
    parser.add_argument("--requests", type=int, default=4, help="of each client")
    parser.add_argument("--memory", default="8", help="GiB of caches")
    parser.add_argument("--snapshots", default="4", help="GiB of snapshots")
    parser.add_argument("--rows", default="128")
    parser.add_argument("--rule", nargs="*", default=[], help="flags of the rule, as in --rule=--top-k=16")
    parser.add_argument("--server", nargs="*", default=[], help="further flags of the server")
    parser.add_argument("--out", metavar="FILE")
    return parser.parse_args()


@contextlib.contextmanager
def _server(options: argparse.Namespace, flags: Sequence[str]) -> Iterator[int]:
    """The port of a server that is ready."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    command = [sys.executable, "-m", "lrsa_lit", "serve", options.model, "--port", str(port), "--name", "model"]
    command += ["--memory", options.memory, "--snapshots", options.snapshots, "--rows", options.rows]
    process = subprocess.Popen([*command, "--max-waiting", "1024", *flags, *options.server], stdout=sys.stderr)
    try:
        while not _is_ready(port):
            if process.poll() is not None:
                raise SystemExit(f"the server ended with code {process.returncode}")
            time.sleep(0.5)
        yield port
    finally:
        process.terminate()
        process.wait()


def _is_ready(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health") as response:
            return bool(response.status == 200)
    except OSError:
        return False


def _measured(options: argparse.Namespace, port: int, clients: int, cached: bool) -> dict[str, Any]:
    from openai import OpenAI

    client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=10, timeout=None)
    shared = [_document(options.tokens, f"shared {number}") for number in range(_CACHED_DOCUMENTS)]
    fresh = random.Random(f"{clients} {port}")

    def prompt(number: int) -> str:
        text = shared[number % len(shared)] if cached else _document(options.tokens, str(fresh.random()))
        return f"{text}\n\nQuestion {number}: which place is named first?"

    # Twice with different questions: then snapshots end where the documents do.
    for number in range(2 * len(shared) if cached else 1):
        _ask(client, prompt(number), options.new)
    prompts = [prompt(1000 + number) for number in range(clients * options.requests)]
    started = time.perf_counter()
    with concurrent.futures.ThreadPoolExecutor(clients) as pool:
        timings = list(pool.map(lambda text: _ask(client, text, options.new), prompts))
    seconds = time.perf_counter() - started
    tokens = [each.per_token for each in timings if each.per_token is not None]
    return {
        "requests": len(timings),
        "requests_per_s": round(len(timings) / seconds, 3),
        "tokens_per_s": round(sum(each.tokens for each in timings) / seconds, 1),
        "first_token_s": _spread([each.first for each in timings]),
        "token_s": _spread(tokens),
        "cached_tokens": round(statistics.mean(each.cached for each in timings)),
    }


def _ask(client: Any, text: str, most: int) -> Timing:
    given = {"model": "model", "messages": [{"role": "user", "content": text}], "temperature": 0, "max_tokens": most}
    started, times = time.perf_counter(), []
    usage = None
    for chunk in client.chat.completions.create(**given, stream=True, stream_options={"include_usage": True}):
        if any(choice.delta.content for choice in chunk.choices):
            times.append(time.perf_counter())
        usage = chunk.usage or usage
    assert usage is not None
    ended, tokens = time.perf_counter(), usage.completion_tokens
    first = times[0] if times else ended
    per_token = (times[-1] - first) / (tokens - 1) if tokens > 1 and len(times) > 1 else None
    return Timing(first - started, per_token, tokens, usage.prompt_tokens_details.cached_tokens)


def _document(tokens: int, seed: str) -> str:
    """Sentences of about so many tokens where a word is one; a tokenizer of bytes makes about six of a word."""
    draw = random.Random(seed)
    return " ".join(draw.choice(WORDS) for _ in range(tokens))


def _spread(seconds: Sequence[float]) -> dict[str, float]:
    if len(seconds) < 2:
        return {"p50": round(seconds[0], 4), "p95": round(seconds[0], 4)} if seconds else {}
    places = statistics.quantiles(seconds, n=100, method="inclusive")
    return {"p50": round(places[49], 4), "p95": round(places[94], 4)}


def _machine() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {platform.machine()}"


if __name__ == "__main__":
    main()
