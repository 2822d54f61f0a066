"""A random Llama whose logits were recorded with the published cache: one rule, however the tokens arrive."""

import json

import numpy as np
import pytest
import torch
from helpers import VECTORS
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from lrsa_lit.attention import LRSACache, LRSAConfig, enable
from lrsa_lit.ops.sparse_attention import spans, stored_size

TOLERANCE = 1e-4
LENGTH = 150


@pytest.fixture(scope="module")
def run():
    data = np.load(VECTORS / "tiny_llama_logits.npz")
    config = LRSAConfig(**json.loads(str(data["params"])))
    return config, *(torch.from_numpy(data[name]) for name in ("input_ids", "logits", "dense_logits"))


def load():
    model = LlamaForCausalLM(LlamaConfig.from_json_file(VECTORS / "tiny_llama_config.json")).eval()
    missing = model.load_state_dict(load_file(VECTORS / "tiny_llama.safetensors"), strict=False)
    assert missing == ([], [])
    return model


@pytest.fixture(scope="module")
def model(run):
    return enable(load(), run[0])


def gap(ours, theirs):
    return float((ours - theirs).abs().max())


@torch.no_grad()
def test_the_plain_model_gives_the_recorded_dense_logits(run):
    _, ids, logits, dense = run
    assert gap(load()(ids).logits, dense) < TOLERANCE
    assert gap(logits, dense) > 1, "a recording that is dense proves nothing"


@torch.no_grad()
def test_the_parallel_pass_gives_the_recorded_logits(run, model):
    _, ids, logits, dense = run
    ours = model(ids, use_cache=False).logits
    assert gap(ours, logits) < TOLERANCE
    assert gap(ours, dense) > 1


SPLITS = {
    "at-once": [150],
    "sevens": [7] * 21 + [3],
    "chunks": [16] * 9 + [6],
    "two-chunks": [32] * 4 + [22],
    "one-by-one": [1] * 150,
    "odd": [1, 35, 1, 15, 50, 2, 45, 1],
    "prompt-then-decode": [100] + [1] * 50,
}


@pytest.mark.parametrize("sizes", SPLITS.values(), ids=SPLITS)
@torch.no_grad()
def test_the_compressed_cache_gives_the_recorded_logits_over_any_split(run, model, sizes):
    config, ids, logits, _ = run
    assert sum(sizes) == LENGTH
    cache, start, parts = LRSACache(config, 3), 0, []
    for size in sizes:
        parts.append(model(ids[:, start : start + size], past_key_values=cache).logits)
        start += size
        assert cache.get_seq_length() == start
        assert cache.stored_tokens() == [stored_size(start, config.rule)] * 3
    assert gap(torch.cat(parts, dim=1), logits) < TOLERANCE
    # S + K P + raw: P(149) = 8 partitions, raw from 4 + 8 x 16.
    assert cache.stored_tokens() == [4 + 4 * 8 + 150 - 132] * 3


@pytest.mark.parametrize("calls", ["spans", "one-by-one"])
@torch.no_grad()
def test_stock_attention_over_the_compressed_cache_gives_the_recorded_logits(run, calls):
    config, ids, logits, dense = run
    model = load()
    cache, parts = LRSACache.of(model, config), []
    cuts = [(span.start, span.stop) for span in spans(0, LENGTH, config.rule)]
    for start, stop in cuts if calls == "spans" else [(at, at + 1) for at in range(LENGTH)]:
        parts.append(model(ids[:, start:stop], past_key_values=cache).logits)
        assert cache.stored_tokens() == [stored_size(stop, config.rule)] * 3
    assert gap(torch.cat(parts, dim=1), logits) < TOLERANCE
    assert gap(torch.cat(parts, dim=1), dense) > 1


@pytest.mark.parametrize("sizes", [[150], [70, 79, 1], [100] + [1] * 50], ids=str)
@torch.no_grad()
def test_an_uncompressed_cache_obeys_the_rule_too(run, model, sizes):
    _, ids, logits, _ = run
    cache, parts, start = None, [], 0
    for size in sizes:
        output = model(ids[:, start : start + size], past_key_values=cache, use_cache=True)
        cache, start = output.past_key_values, start + size
        parts.append(output.logits)
    assert cache.get_seq_length() == LENGTH
    assert gap(torch.cat(parts, dim=1), logits) < TOLERANCE


@pytest.mark.parametrize("chunk_size", [1, 2, 4, 8, 16])
@torch.no_grad()
def test_every_chunk_that_divides_the_lag_gives_the_recorded_logits(run, chunk_size):
    config, ids, logits, _ = run
    config = config.replace(chunk_size=chunk_size)
    model = enable(load(), config)
    assert gap(model(ids, use_cache=False).logits, logits) < TOLERANCE
    assert gap(model(ids, past_key_values=LRSACache(config, 3)).logits, logits) < TOLERANCE


@pytest.mark.parametrize("change", [{"chunk_size": 32}, {"top_k": 5}, {"sink_size": 3}, {"value_weight": 0.0}], ids=str)
@torch.no_grad()
def test_another_rule_gives_other_logits(run, change):
    config, ids, logits, _ = run
    model = enable(load(), config.replace(**change))
    assert gap(model(ids, use_cache=False).logits, logits) > 0.01
