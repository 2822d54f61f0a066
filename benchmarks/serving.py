"""How many readers does ``lrsa serve`` answer at once, and how fast, with LRSA and with dense caches in equal memory?

    python benchmarks/serving.py --shape smollm2-135m [--kinds dense 128/32 128/16] [--clients 1 8 32 128]
    python benchmarks/serving.py --model MODEL --tokens 8192 --memory 8

Each server is the command itself, in a process of its own, with dense caches or the rule L/K. So many clients at a time
ask, one request after the other; a document of about ``--tokens`` tokens goes before each question. Fresh documents
differ from request to request; cached ones are a few that were read before the clock starts. Answers are greedy, of
``--new`` tokens at most, and streamed: the first token is the first piece of text that arrives, and the time per token
is that of the rest. ``rows_at_once`` is the most answers that were decoded together, ``refused`` how often a client got
status 429 and asked again.

``--shape`` measures random weights of a folder of ``shapes/``, of which every token is a word, so that nothing has to
be downloaded; beyond its positions, its rotary frequencies are scaled. Writes ``results/serving.json``; rows that it
has from the same commit, device and versions are not measured again, and none is begun after ``--seconds``. A row that
fails is written with the reason, and the exit code is then 1.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import functools
import http.client
import itertools
import json
import random
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from random_model import WORDS, write_model
from records import RESULTS, Record, about

KEYS = "kind", "cached", "clients"
SETTINGS = "tokens", "new", "requests", "memory", "snapshots", "most_rows"
"""What is asked and given, in each row."""
_CACHED_DOCUMENTS = 4
_POLL = 0.25
"""Seconds between two looks at the server's metrics."""


class Timing(NamedTuple):
    """Seconds of one request, and what came of it."""

    first: float
    per_token: float | None
    tokens: int
    prompt: int
    cached: int
    refused: int


def main(args: list[str] | None = None) -> int:
    started, options = time.perf_counter(), _parse(args)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    common = {"model": options.shape or options.model, **{name: getattr(options, name) for name in SETTINGS}}
    facts = about("transformers", "litserve", device=device)
    record = Record(options.out / "serving.json", facts, (*common, *KEYS))
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        model = options.model
        if options.shape:
            model = str(write_model(options.shape, Path(folder), options.tokens + options.new + 512))
        servers = _Servers(stack, model, options)
        wanted = [
            (common | dict(zip(KEYS, key, strict=True)), functools.partial(_measured, servers, *key, options))
            for key in itertools.product(options.kinds, (False, True), options.clients)
        ]
        for row in record.measure(wanted, started + options.seconds):
            print(json.dumps(row), flush=True)
    return int(any("skipped" in row for row in record.rows))


def _parse(args: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--model", default="tiny", help="what `lrsa serve` takes")
    source.add_argument("--shape", help="a folder of shapes/, for random weights")
    parser.add_argument("--kinds", nargs="+", default=["dense", "128/32", "128/16"], help="dense, or L/K")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32, 128])
    parser.add_argument("--tokens", type=int, default=8192, help="of a document, about")
    parser.add_argument("--new", type=int, default=128, help="most tokens of an answer")
    parser.add_argument("--requests", type=int, default=4, help="of each client")
    parser.add_argument("--memory", default="8", help="GiB of caches")
    parser.add_argument("--snapshots", default="4", help="GiB of snapshots")
    parser.add_argument("--most-rows", default="256", help="most answers that are decoded together")
    parser.add_argument("--waiting", default="1024", help="requests that may wait")
    parser.add_argument("--server", action="append", default=[], metavar="FLAG", help="of the server: --server=--x=1")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no row after so many")
    parser.add_argument("--out", type=Path, default=RESULTS)
    return parser.parse_args(args)


class _Servers:
    """One server at a time, which ends with the stack."""

    def __init__(self, stack: contextlib.ExitStack, model: str, options: argparse.Namespace) -> None:
        self._running, self._model, self._options = stack.enter_context(contextlib.ExitStack()), model, options
        self._kind, self._port = "", 0

    def port(self, kind: str) -> int:
        """The port of a server of this kind that is ready."""
        if kind != self._kind:
            self._running.close()
            self._port, self._kind = self._running.enter_context(self._server(kind)), kind
        return self._port

    @contextlib.contextmanager
    def _server(self, kind: str) -> Iterator[int]:
        options, (lag, _, keep) = self._options, kind.partition("/")
        flags = ["--dense"] if kind == "dense" else ["--lag-size", lag, "--top-k", keep]
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port: int = probe.getsockname()[1]
        command = [sys.executable, "-m", "lrsa_lit", "serve", self._model, "--port", str(port), "--name", "model"]
        command += ["--memory", options.memory, "--snapshots", options.snapshots, "--rows", options.most_rows]
        command += ["--max-waiting", options.waiting]
        process = subprocess.Popen([*command, *flags, *options.server], stdout=sys.stderr)
        try:
            while not _is_ready(port):
                if process.poll() is not None:
                    raise RuntimeError(f"the server ended with code {process.returncode}")
                time.sleep(_POLL)
            yield port
        finally:
            process.terminate()
            process.wait()


def _is_ready(port: int) -> bool:
    try:
        return _get(port, "/health")[0] == 200
    except OSError:
        return False


def _get(port: int, path: str) -> tuple[int, str]:
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port)) as connection:
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, response.read().decode()


def _measured(servers: _Servers, kind: str, cached: bool, clients: int, options: argparse.Namespace) -> dict[str, Any]:
    port = servers.port(kind)
    ask = functools.partial(_ask, port, most=options.new)
    words = _words(port, options.tokens)
    shared = [_document(words, f"shared {number}") for number in range(_CACHED_DOCUMENTS)]
    fresh = random.Random(f"{clients} {kind}")

    def prompt(number: int) -> str:
        text = shared[number % len(shared)] if cached else _document(words, str(fresh.random()))
        return f"{text}\n\nQuestion {number}: which place is named first?"

    # Twice with different questions: then snapshots end where the documents do.
    for number in range(2 * len(shared) if cached else 1):
        ask(prompt(number))
    prompts = [prompt(1000 + number) for number in range(clients * options.requests)]
    with _most(port, "lrsa_rows", "lrsa_reserved_bytes") as most:
        started = time.perf_counter()
        with concurrent.futures.ThreadPoolExecutor(clients) as pool:
            timings = list(pool.map(ask, prompts))
        seconds = time.perf_counter() - started
    return {
        "requests": len(timings),
        "prompt_tokens": round(statistics.mean(each.prompt for each in timings)),
        "cached_tokens": round(statistics.mean(each.cached for each in timings)),
        "requests_per_s": round(len(timings) / seconds, 3),
        "tokens_per_s": round(sum(each.tokens for each in timings) / seconds, 1),
        "first_token_s": _spread([each.first for each in timings]),
        "token_s": _spread([each.per_token for each in timings if each.per_token is not None]),
        "rows_at_once": round(most["lrsa_rows"]),
        "reserved_gib": round(most["lrsa_reserved_bytes"] / 2**30, 3),
        "refused": sum(each.refused for each in timings),
    }


def _ask(port: int, text: str, most: int) -> Timing:
    """Ask, and read the stream. OpenAI's client would take longer for a piece of text than a busy server does."""
    given = {"model": "model", "messages": [{"role": "user", "content": text}], "temperature": 0, "max_tokens": most}
    body = json.dumps({**given, "stream": True, "stream_options": {"include_usage": True}})
    started, times, usage, refused = time.perf_counter(), [], None, 0
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port)) as connection:
        while True:
            connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            if response.status != 429:
                break
            response.read()
            refused += 1
            time.sleep(float(response.headers["Retry-After"]))
        if response.status != 200:
            raise RuntimeError(f"status {response.status}: {response.read().decode()[:150]}")
        for line in response:
            if not line.startswith(b"data: {"):
                continue
            chunk = json.loads(line[len(b"data: ") :])
            if "error" in chunk:
                raise RuntimeError(str(chunk["error"]))
            if any(choice["delta"].get("content") for choice in chunk["choices"]):
                times.append(time.perf_counter())
            usage = chunk.get("usage") or usage
    if usage is None:
        raise RuntimeError("the stream ended early")
    ended, tokens = time.perf_counter(), usage["completion_tokens"]
    first = times[0] if times else ended
    per_token = (times[-1] - first) / (tokens - 1) if tokens > 1 and len(times) > 1 else None
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    return Timing(first - started, per_token, tokens, usage["prompt_tokens"], cached, refused)


@contextlib.contextmanager
def _most(port: int, *names: str) -> Iterator[dict[str, float]]:
    """The highest value of gauges within the block, of those that were seen every so often."""
    highest, ended = dict.fromkeys(names, 0.0), threading.Event()

    def watch() -> None:
        while not ended.wait(_POLL):
            shown = _get(port, "/metrics")[1]
            for name in names:
                found = re.search(rf"^{name} (\S+)$", shown, re.MULTILINE)
                highest[name] = max(highest[name], float(found[1]) if found else 0.0)

    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        watching = pool.submit(watch)
        try:
            yield highest
        finally:
            ended.set()
        watching.result()


def _words(port: int, tokens: int) -> int:
    """The words of a document of so many tokens: a tokenizer of bytes makes about seven of a word."""
    few, many = (_ask(port, _document(count, "probe"), 1).prompt for count in (100, 300))
    return max(1, round(tokens * 200 / (many - few)))


def _document(words: int, seed: str) -> str:
    draw = random.Random(seed)
    return " ".join(draw.choice(WORDS) for _ in range(words))


def _spread(seconds: Sequence[float]) -> dict[str, float]:
    if len(seconds) < 2:
        return {"p50": round(seconds[0], 4), "p95": round(seconds[0], 4)} if seconds else {}
    places = statistics.quantiles(seconds, n=100, method="inclusive")
    return {"p50": round(places[49], 4), "p95": round(places[94], 4)}


if __name__ == "__main__":
    sys.exit(main())
