"""Prompts, rules and what the tests of the server share."""

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import torch

from lrsa_lit.attention import Greedy, LRSAConfig
from lrsa_lit.cli import serve
from lrsa_lit.data.messages import render_messages
from lrsa_lit.data.tokenization import encode_text
from lrsa_lit.models.generation import stop_tokens
from lrsa_lit.models.tiny import tiny_tokenizer
from lrsa_lit.ops.sparse_attention import QueryAttention
from lrsa_lit.serving.engine import Limits
from lrsa_lit.serving.job import Job
from lrsa_lit.serving.text_stream import TextStream

RULE = LRSAConfig(sink_size=2, lag_size=8, top_k=3)
STOPS = frozenset(stop_tokens(tiny_tokenizer()))
KINDS = {
    "rule": RULE,
    "chunk": RULE.replace(chunk_size=5),
    "dense-layer": RULE.replace(dense_layers=(1,)),
    "queries": RULE.replace(compressor=QueryAttention(window=3)),
    "heads": RULE.replace(head_top_k=[[2, 5], 3]),
    "dense": RULE.replace(dense_layers=(0, 1)),
}
ROOMY = Limits(tokens_per_step=16)


def prompt(length, seed=0):
    return [random.Random(f"{seed}.{place}").randrange(3, 259) for place in range(length)]


def alone(model, job, stops=STOPS):
    """The tokens that answer a job by itself, the likeliest each time."""
    return Greedy(model, stops, max_new_tokens=job.max_new_tokens)(torch.tensor([job.ids]))[0]


def run(engine, jobs, *, arriving=1):
    """The answers of all jobs, of which some arrive each step: tokens by job and choice, and the last events."""
    answers, ends, left = {}, {}, list(jobs)
    while left or not engine.idle:
        for job in left[:arriving]:
            engine.submit(job)
        del left[:arriving]
        for event in engine.step():
            key = event.uid, event.choice
            assert key not in ends, "an event behind the end"
            answers.setdefault(key, [])
            if event.token is not None:
                answers[key].append(event.token)
            if event.finish is not None:
                ends[key] = event
    assert answers.keys() == ends.keys() == {(job.uid, choice) for job in jobs for choice in range(job.choices)}
    assert engine.held[:4] == (0, 0, 0, 0), "something is left"
    return answers, ends


KEY = "a key"
MESSAGE = {"role": "user", "content": "?"}
FLAGS = ["--lag-size", "8", "--top-k", "3", "--sink-size", "2"]
SCRIPT = "import serving_helpers; serving_helpers.serve_in_float64()"


def serve_in_float64():
    """The command with the arguments of the process; the model computes in float64, so that batches change no token."""
    serve._Load = Doubled
    serve.run(sys.argv[1:])


class Doubled(serve._Load):
    """The model in float64."""

    def __call__(self, device):
        model, stops = super().__call__(device)
        return model.double(), stops


class Server:
    """``lrsa serve tiny`` in a process of its own."""

    def __init__(self, log, *flags):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        paths = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
        arguments = [sys.executable, "-c", SCRIPT, "tiny", *FLAGS, "--port", str(self.port), *flags]
        environment = os.environ | {"LRSA_API_KEY": KEY, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
        self.log = log
        with open(log, "wb") as file:
            self.process = subprocess.Popen(arguments, env=environment, stdout=file, stderr=file)
        while self.get("/health")[0] != 200:
            # Asking again at once would take the time that it needs to start.
            with contextlib.suppress(subprocess.TimeoutExpired):
                raise AssertionError(self.process.wait(0.2), Path(log).read_text())

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}"

    def get(self, path, key=KEY, body=None, headers=None):
        """Status, text and headers; 0 where nobody listens."""
        headers = {"Authorization": f"Bearer {key}"} | (headers or {})
        request = urllib.request.Request(self.url + path, body, headers)
        try:
            with urllib.request.urlopen(request) as response:
                return response.status, response.read().decode(), response.headers
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode(), error.headers
        except OSError:
            return 0, "", {}

    def count(self, name):
        """A number that the server counts."""
        lines = self.get("/metrics")[1].splitlines()
        return next(float(line.rpartition(" ")[2]) for line in lines if line.startswith(f"{name} "))

    def connected(self, **body):
        """A socket that has asked."""
        text = json.dumps({"model": "tiny", "messages": [MESSAGE], "temperature": 0} | body).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n"
        link = socket.create_connection(("127.0.0.1", self.port))
        link.sendall(f"{head}Content-Length: {len(text)}\r\n\r\n".encode() + text)
        return link

    def client(self, **options):
        from openai import OpenAI

        return OpenAI(base_url=f"{self.url}/v1", api_key=KEY, **{"max_retries": 0, **options})

    def end(self):
        """The exit code, once it has ended by SIGTERM."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait()


def chat(content):
    """A conversation of one message, and its prompt's tokens."""
    messages, tokenizer = [{"role": "user", "content": content}], tiny_tokenizer()
    rendered = render_messages(messages, tokenizer)
    return messages, encode_text(tokenizer, rendered.text, rendered.user).ids


def text_alone(model, content, most, stops=()):
    """The text that answers a message by itself."""
    stream, texts = TextStream(tiny_tokenizer(), stops), []
    for token in alone(model, Job("x", chat(content)[1], most)):
        texts.append(stream.push(token))
        if stream.stopped:
            break
    return "".join([*texts, stream.end()])
