"""A cache of latents: the logits of a cache of keys and values, and fewer bytes."""

import copy
import pickle

import pytest
import torch
from helpers import narrowed, refused

from lrsa_lit.attention import LRSACache, LRSAConfig, cache_argument, enable, using
from lrsa_lit.models import LowRank
from lrsa_lit.models.factors import factor, projections
from lrsa_lit.ops.sparse_attention import SharedHeads, Strided, stored_size

SPLITS = {"at-once": [90], "odd": [1, 17, 1, 40, 31], "decode": [60] + [1] * 30}
HEADS, DIM = 2, 8


@pytest.fixture(scope="module", params=["joint", "head"])
def grouping(request):
    return request.param


@pytest.fixture(scope="module")
def config(grouping, rule):
    """Where a latent is of all heads, these keep the same tokens."""
    chosen = rule if grouping == "head" else rule.replace(compressor=SharedHeads())
    return chosen.replace(latents=True)


@pytest.fixture(scope="module")
def model(whole, grouping, config):
    return enable(narrowed(whole("Llama"), grouping), config)


@torch.no_grad()
def feed(model, cache, ids, sizes, mask=None):
    parts, start = [], 0
    for size in sizes:
        given = {} if mask is None else {"attention_mask": mask[:, : start + size]}
        given |= cache_argument(model, cache)
        parts.append(model(ids[:, start : start + size], **given).logits)
        start += size
    return torch.cat(parts, dim=1)


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("sizes", SPLITS.values(), ids=SPLITS)
@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Qwen3", "SmolLM3"])
def test_logits_are_those_of_the_parallel_pass(family, sizes, grouping, config, whole, tokens):
    model, ids = enable(narrowed(whole(family), grouping), config), tokens(2, 90)
    cache = LRSACache.of(model)
    close(feed(model, cache, ids, sizes), model(ids, use_cache=False).logits)
    assert cache.stored_tokens() == [2 * stored_size(90, config.rule)] * 3
    assert cache.get_seq_length() == 90


def test_tokens_that_are_kept_are_those_of_a_cache_of_keys_and_values(model, config, tokens):
    ids, latents = tokens(1, 90), LRSACache.of(model)
    feed(model, latents, ids, [50, 40])
    with using(model, config.replace(latents=False)):
        whole = LRSACache.of(model)
        feed(model, whole, ids, [50, 40])
    for ours, theirs in zip(latents.layers, whole.layers, strict=True):
        for found, expected in zip(ours.streams[0].stored, theirs.streams[0].stored, strict=True):
            close(found, expected)


@pytest.mark.parametrize("ratio", [0.25, 0.5])
def test_bytes_are_those_of_latents_and_positions(ratio, grouping, config, whole, tokens):
    model, ids = enable(narrowed(whole("Llama"), grouping, ratio), config), tokens(1, 90)
    cache = LRSACache.of(model)
    feed(model, cache, ids, [90])
    (measured,) = cache.measured(1)
    latents = HEADS if grouping == "head" else 1
    rank = projections(model)[0].k_proj.ranks[0]
    assert rank * latents == ratio * HEADS * DIM
    numbers = stored_size(90, config.rule) * latents
    assert measured.held == cache.nbytes == 3 * numbers * (2 * rank * 8 + 4)
    assert measured.dense == 3 * 90 * 2 * HEADS * DIM * 8
    # Within a call one layer's keys and values are there as well.
    assert measured.peak > measured.held


def test_rows_of_unequal_lengths_get_what_each_gets_alone(model, tokens):
    lengths, cache = [90, 33, 7], LRSACache.of(model)
    ids, mask = torch.full((3, 90), 33), torch.zeros(3, 90, dtype=torch.long)
    for row, length in enumerate(lengths):
        ids[row, -length:], mask[row, -length:] = tokens(1, length, seed=length), 1
    logits = feed(model, cache, ids, [40, 30] + [1] * 20, mask)
    for row, length in enumerate(lengths):
        close(logits[row, None, -length:], model(ids[row, None, -length:], use_cache=False).logits)


def test_copies_reorderings_and_further_turns(model, tokens):
    ids, cache = tokens(3, 90), LRSACache.of(model)
    feed(model, cache, ids[:, :60], [60])
    twin = copy.deepcopy(cache)
    expected = model(ids, use_cache=False).logits[:, 60:]
    close(feed(model, cache, ids[:, 60:], [30]), expected)
    twin.reorder_cache(torch.tensor([2, 0, 0]))
    order = [2, 0, 0]
    close(feed(model, twin, ids[order, 60:], [1] * 30), expected[order])


def test_generation_is_that_of_keys_and_values(model, config, tokens):
    ids, options = tokens(2, 40), {"max_new_tokens": 24, "min_new_tokens": 24, "do_sample": False}
    found = model.generate(ids, **options, past_key_values=LRSACache.of(model))
    with using(model, config.replace(latents=False)):
        expected = model.generate(ids, **options, past_key_values=LRSACache.of(model))
    assert torch.equal(found, expected)


def test_whole_layers_and_dense_ones(whole, tokens, rule):
    """Layers without latents hold keys and values; those without a rule hold the latents of all tokens."""
    model = whole("Llama")
    factor(model, LowRank(ratio=0.5, grouping="head", dense_layers=(1,)))
    config = rule.replace(latents=True, dense_layers=(0,))
    ids = tokens(1, 90)
    cache = LRSACache.of(enable(model, config))
    close(feed(model, cache, ids, [50, 1, 39]), model(ids, use_cache=False).logits)
    stored = stored_size(90, rule.rule)
    assert cache.stored_tokens() == [90, stored, stored]
    pair, latent = 2 * HEADS * DIM * 8, HEADS * (2 * 4 * 8 + 4)
    assert [layer.nbytes for layer in cache.layers] == [90 * latent, stored * pair, stored * latent]


def test_adapters_on_the_factors(whole, tokens, rule):
    import peft

    config = rule.replace(latents=True)
    adapted = peft.get_peft_model(
        narrowed(whole("Llama"), "head"),
        peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False),
    )
    model, ids = enable(adapted.double().eval(), config), tokens(1, 90)
    close(feed(model, LRSACache.of(model), ids, [50, 1, 39]), model(ids, use_cache=False).logits)


@pytest.mark.parametrize("compressor", ["QueryAttention", "KeyDiff", "RandomTokens", "LagRelativeTail"])
def test_other_selectors(compressor, whole, tokens, rule):
    init_args = {"QueryAttention": {"window": 3, "kernel": 3}}.get(compressor, {})
    config = rule.replace(latents=True, compressor={"class_path": compressor, "init_args": init_args})
    model, ids = enable(narrowed(whole("Llama"), "head"), config), tokens(2, 90)
    for sizes in SPLITS.values():
        close(feed(model, LRSACache.of(model), ids, sizes), model(ids, use_cache=False).logits)


def test_bfloat16_under_autocast(tokens, rule, whole):
    model, ids = (
        enable(narrowed(whole("Llama", dtype=torch.float32), "head"), rule.replace(latents=True)),
        tokens(1, 60),
    )
    with torch.autocast("cpu", torch.bfloat16):
        found = feed(model, LRSACache.of(model), ids, [40] + [1] * 20)
        expected = model(ids, use_cache=False).logits
    assert (found - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"system": "StreamingLLM"}, "with a system"),
        ({"head_top_k": [[1, 2]]}, "with head_top_k"),
        ({"compressor": "MeanPool"}, "with MeanPool"),
        ({"compressor": "TokenGate"}, "with TokenGate"),
    ],
)
def test_rules_that_hold_no_latents(changes, reason):
    with refused("latents", reason=reason):
        LRSAConfig(latents=True, **changes)


def test_models_that_have_none(whole, rule):
    config = rule.replace(latents=True)
    with refused("latents", reason="do not exist"):
        enable(whole("Llama"), config)
    with refused("latents", reason="LRSACache.of"):
        LRSACache(config, 3)
    with refused("latents", reason="over all heads together"):
        enable(narrowed(whole("Olmo2"), "head"), config)
    with refused("latents", reason="its heads keep different tokens"):
        enable(narrowed(whole("Llama"), "joint"), config)
    # Each head keeps the same places.
    enable(narrowed(whole("Llama"), "joint"), config.replace(compressor=Strided()))


def test_a_layer_that_makes_its_keys_otherwise(whole, tokens, rule):
    model = enable(narrowed(whole("Llama"), "head"), rule.replace(latents=True))
    ids = tokens(1, 20)
    with refused("latents", reason="another way, or at other positions"):
        model(ids, position_ids=torch.arange(5, 25)[None], **cache_argument(model, LRSACache.of(model)))


def test_a_pickled_cache_belongs_to_no_model(model, tokens):
    cache = LRSACache.of(model)
    feed(model, cache, tokens(1, 20), [20])
    with refused("cache", reason="without its model"):
        _ = pickle.loads(pickle.dumps(cache)).layers[0].streams[0].stored


def test_the_rule_says_so_and_older_digests_stay(rule):
    assert "latents" not in rule.to_dict()
    config = rule.replace(latents=True)
    assert config.to_dict()["latents"] is True
    assert LRSAConfig.from_dict(config.to_dict()) == config
