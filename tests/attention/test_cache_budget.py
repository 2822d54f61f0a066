"""Attention at a share of the cache: the largest one whose measured bytes are within it."""

import pytest
import torch
from helpers import refused
from hypothesis import given, settings
from hypothesis import strategies as st

from lrsa_lit.attention import (
    Greedy,
    LRSACache,
    LRSAConfig,
    at_budget,
    cache_share,
    enable,
    head_of,
    prefill,
    shares,
    using,
)
from lrsa_lit.errors import UserError
from lrsa_lit.models import Backbone, LowRank
from lrsa_lit.models.factors import factor
from lrsa_lit.models.folder import save_folder
from lrsa_lit.models.tiny import tiny_model, tiny_tokenizer
from lrsa_lit.ops.sparse_attention import Centroids, LagRelative, QueryAttention, TokenGate
from lrsa_lit.systems import (
    TOVA,
    AdaKV,
    Cascade,
    ChunkKV,
    ChunkKVPress,
    DuoAttention,
    ExpectedAttention,
    FreqKV,
    Head,
    KeyDiff,
    KeyDiffBlocks,
    KeyNorm,
    LagKVPress,
    Random,
    SnapKV,
    SparseAccelerate,
    SqueezedAttention,
    StreamingLLM,
)

LAYERS = 3
HEAD = Head(2, 8, 4)
PROMPTS = torch.randint(3, 259, (1, 100), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def model():
    return tiny_model(num_layers=LAYERS, num_heads=4, num_kv_heads=2, hidden_size=32)


def measured(model, config, tokens):
    """Bytes of the filled parts of all tensors that a cache holds behind a prompt, and what a dense one takes."""
    with using(model, config), torch.no_grad():
        cache = LRSACache.of(model)
        prefill(model, PROMPTS[:, :tokens], cache, tokens_per_call=37)
        cache.end_prompt()
    held = sum(part.numel() * part.element_size() for layer in cache.layers for stream in layer.streams
               for buffer in stream.buffers for part in buffer.filled)  # fmt: skip
    (found,) = cache.measured(1)
    assert (found.held, found.dense) == (held, LAYERS * 2 * tokens * 2 * 8 * 4)
    return held / found.dense


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_a_rule_is_the_largest_whose_measured_cache_is_within_the_budget(data, model):
    lag, sink = data.draw(st.integers(2, 12)), data.draw(st.integers(0, 5))
    tokens, share = data.draw(st.integers(40, 100)), data.draw(st.integers(50, 1000).map(lambda share: share / 1000))
    compressor = data.draw(st.sampled_from([LagRelative(), QueryAttention(window=2), Centroids(), TokenGate()]))
    dense = data.draw(st.sampled_from([(), (1,)]))
    config = LRSAConfig(sink, lag, 0, dense_layers=dense, compressor=compressor)
    try:
        found = at_budget(config, share, tokens, LAYERS, head_of(model.config, 4))
    except UserError:
        assert measured(model, config, tokens) > share
        return
    assert measured(model, found, tokens) <= share
    if found.top_k < lag:
        assert measured(model, found.replace(top_k=found.top_k + 1), tokens) > share


@settings(max_examples=15, deadline=None)
@given(
    tokens=st.integers(20, 100),
    share=st.integers(100, 1000).map(lambda share: share / 1000),
    dense=st.sampled_from([(), (0, 2)]),
)
def test_a_system_is_the_largest_whose_measured_cache_is_within_the_budget(tokens, share, dense, model):
    config = LRSAConfig(system=StreamingLLM(sink_size=3), dense_layers=dense)
    try:
        found = at_budget(config, share, tokens, LAYERS, head_of(model.config, 4))
    except UserError:
        smallest = config.replace(system=StreamingLLM(sink_size=3, pairs=3))
        assert measured(model, smallest, tokens) > share
        return
    assert measured(model, found, tokens) <= share
    if found.system.pairs < tokens:
        larger = config.replace(system=StreamingLLM(sink_size=3, pairs=found.system.pairs + 1))
        assert measured(model, larger, tokens) > share


@pytest.mark.parametrize(
    ("system", "looser"),
    [
        (SnapKV(window=4), 0), (TOVA(), 0), (ExpectedAttention(), 0), (KeyDiff(), 0), (LagKVPress(lag_size=8), 0),
        (Random(), 0), (KeyDiffBlocks(block=8), 0), (ChunkKV(size=5, window=3), 5),
        (ChunkKVPress(size=5, scorer=SnapKV(window=4)), 6),
        (Cascade(caches=3, sink_size=2, stride=16), 2), (FreqKV(), 100),
        (AdaKV(scorer=SnapKV(window=4)), 0), (DuoAttention([[0.1, 0.9], [0.4, 0.3], [0.2, 0.8]], 0.5, 2, 6), 16),
    ],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
@pytest.mark.parametrize("share", [0.23, 0.6])
def test_each_system_holds_what_its_budget_says(system, looser, share, model):
    config = at_budget(LRSAConfig(system=system), share, 96, LAYERS, head_of(model.config, 4))
    with using(model, config):
        greedy = Greedy(model, stops=(), max_new_tokens=1)
        greedy(PROMPTS[:, :96])
    found = shares([greedy.usage])
    # Of a pair at most; fewer where chunks are whole, the sub-caches equal or a round has just ended.
    assert share - (1 + looser) / 96 * 1.1 < found["cache"] <= share
    assert found["cache"] <= found["peak"] <= 1.2
    # Pairs of 8 channels; a cascade has a score for each.
    pair = config.system.held_bytes(96, HEAD) / config.system.held(96)
    assert found["kept"] == pytest.approx(found["cache"] * HEAD.pair / pair)
    assert 0 < found["pairs"] <= 1


def test_systems_that_hold_everything_read_or_attend_to_less(model):
    found = {}
    for system in (SqueezedAttention(observed=10), SparseAccelerate(10, 10, 5, 10, 8, 2, 2, 8, 1, 20)):
        with using(model, LRSAConfig(system=system)):
            greedy = Greedy(model, stops=(), max_new_tokens=4)
            greedy(PROMPTS)
        found[type(system).__name__] = shares([greedy.usage])
    squeezed, sparse = found["SqueezedAttention"], found["SparseAccelerate"]
    assert (squeezed["cache"] > 1, 0.2 < squeezed["read"] < 0.6, squeezed["pairs"]) == (True, True, 1.0)
    assert squeezed["kept"] == sparse["kept"] == 1.0
    assert all(each["peak"] >= each["cache"] for each in found.values())
    assert (sparse["cache"], "read" in sparse, 0.1 < sparse["pairs"] < 0.9) == (1.0, False, True)


def test_a_bounded_cache_is_its_capacity_at_most_and_at_its_peak(model):
    config = at_budget(LRSAConfig(system=FreqKV()), 0.35, 100, LAYERS, head_of(model.config, 4))
    assert config.system.capacity == 35
    with using(model, config):
        greedy = Greedy(model, stops=(), max_new_tokens=1)
        greedy(PROMPTS)
    found = shares([greedy.usage])
    # Rounds of 16 tokens, the last of which begins at 99 with the sinks and 15 pairs.
    assert (found["cache"], found["peak"]) == (0.20, 0.35)
    assert found["pairs"] == pytest.approx(config.system.attended_pairs(100) / 5050)


def test_what_answers_take_is_measured_row_by_row(model):
    prompts, mask = PROMPTS.reshape(2, 50), torch.ones(2, 50, dtype=torch.long)
    mask[1, :20] = 0
    config = LRSAConfig(system=KeyNorm(pairs=10), dense_layers=(1,))
    with using(model, config):
        greedy = Greedy(model, stops=(), max_new_tokens=3)
        greedy(prompts, mask)
    found = shares([greedy.usage])
    assert found["cache"] == pytest.approx((50 + 30 + 2 * 2 * 10) / (3 * 80))
    assert (found["peak"], found["pairs"], "read" in found) == (1.0, 1.0, False)
    assert found["first_token_seconds"] > 0 < found["token_seconds"]


def test_what_a_system_looks_up_is_told_beside_what_it_holds(model, monkeypatch):
    monkeypatch.setattr("lrsa_lit.systems.one_shot.OneShotStream.read_share", 0.25)
    with using(model, LRSAConfig(system=KeyNorm(1.0), dense_layers=(1,))):
        greedy = Greedy(model, stops=(), max_new_tokens=2)
        greedy(PROMPTS)
    found = shares([greedy.usage])
    # The dense layer's share of the answer's tokens is that of the prompt's.
    assert (found["cache"], found["read"]) == (1.0, pytest.approx(0.5))


@pytest.mark.parametrize(
    ("config", "share", "said"),
    [
        (LRSAConfig(4, 8, 2), 0, "above 0 and at most 1"),
        (LRSAConfig(4, 8, 2), 1.5, "above 0 and at most 1"),
        (LRSAConfig(4, 8, 2), 0.1, "at least 0.2000 for LagRelative at 100 tokens, where 4 sinks and 16 window tokens"),
        (
            LRSAConfig(4, 8, 2, dense_layers=(0,)),
            0.3,
            "at least 0.4667 for LagRelative at 100 tokens, where 4 sinks and 16 window tokens are always kept, and",
        ),
        (LRSAConfig(4, 100), 0.9, "at least 1.0000"),
        (LRSAConfig(system=StreamingLLM(sink_size=30)), 0.2, "at least 0.3000 for StreamingLLM"),
    ],
)
def test_a_budget_below_what_always_stays_is_refused_with_the_floor(config, share, said):
    with refused("budget", share, said):
        at_budget(config, share, 100, LAYERS, Head(2, 16, 2))


def test_heads_with_budgets_are_refused_another_one():
    with refused("budget", 0.5, reason="head_top_k"):
        at_budget(LRSAConfig(lag_size=8, top_k=2, head_top_k=(1, 2, 3)), 0.5, 100, LAYERS, Head(2, 16, 2))


def test_a_system_without_a_size_is_refused(monkeypatch):
    monkeypatch.setattr(KeyNorm, "budget_field", "")
    with refused("budget", 0.5, reason="KeyNorm has no size"):
        at_budget(LRSAConfig(system=KeyNorm()), 0.5, 100, LAYERS, Head(2, 16, 2))


@pytest.mark.whole
@pytest.mark.parametrize(("dense", "whole"), [((), (2,)), ((1,), ())])
def test_a_cache_of_latents_holds_what_its_budget_says(dense, whole):
    low_rank = LowRank(ratio=0.5, grouping="head", dense_layers=whole)
    backbone = Backbone("tiny", low_rank=low_rank)
    model = tiny_model(num_layers=LAYERS).eval()
    factor(model, low_rank)
    backbone.config.num_hidden_layers = LAYERS
    config = LRSAConfig(sink_size=4, lag_size=8, top_k=2, latents=True, dense_layers=dense)
    for share in (0.4, 0.5):
        found = at_budget(config, share, 96, LAYERS, backbone.head)
        cache = LRSACache.of(enable(model, found))
        with torch.no_grad():
            model(torch.arange(3, 99)[None], past_key_values=cache)
        (measured,) = cache.measured(1)
        assert measured.held / measured.dense <= share
        more = found.replace(top_k=found.top_k + 1)
        assert cache_share(more, 96, LAYERS, backbone.head) > share
        expected = cache_share(found, 96, LAYERS, backbone.head)
        assert measured.held / measured.dense == pytest.approx(expected, rel=1e-6)
    with refused("budget", reason="", allowed="at least"):
        at_budget(config, 0.1, 96, LAYERS, backbone.head)
    with refused("latents", reason="do not exist"):
        at_budget(config, 0.5, 96, LAYERS, HEAD)


def test_factors_in_a_folder_are_counted_as_those_that_are_made(tmp_path):
    for grouping in ("joint", "head"):
        made = Backbone("tiny", low_rank=LowRank(ratio=0.25, grouping=grouping, dense_layers=(1,)))
        save_folder(made.build(), tiny_tokenizer(), tmp_path / grouping)
        assert Backbone(str(tmp_path / grouping)).head == made.head
