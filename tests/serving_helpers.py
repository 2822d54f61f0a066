"""Prompts, rules and what the tests of the server share."""

import random

import torch

from lrsa_lit.attention import Greedy, LRSAConfig
from lrsa_lit.models.generation import stop_tokens
from lrsa_lit.models.tiny import tiny_tokenizer
from lrsa_lit.ops.sparse_attention import QueryAttention
from lrsa_lit.serving.engine import Limits

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
