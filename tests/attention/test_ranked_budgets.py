"""K of each head by a ranking and a share of the cache: as many dense heads as the measured bytes allow, the best."""

import json
from fractions import Fraction

import pytest
import torch
from helpers import refused
from hypothesis import given
from hypothesis import strategies as st

from lrsa_lit.attention import LRSACache, LRSAConfig, prefill, using
from lrsa_lit.models.tiny import tiny_model
from lrsa_lit.ops.sparse_attention import Centroids, QueryAttention, stored_size
from lrsa_lit.systems import DuoAttention

GATES = [[0.9, 0.1], [0.4, 1.0], [0.4, 0.2]]
"""Of three layers with two heads; from the best: 1.1, 0.0, 1.0, 2.0, 2.1, 0.1."""
ORDER = [(1, 1), (0, 0), (1, 0), (2, 0), (2, 1), (0, 1)]
HEADS = {"worths": [[2.5, -0.1], [0.3, 7.0], [0.3, 0.0]], "rule": {"lag_size": 8}}
LAYERS = {"ranking": [{"layer": 2, "fall": 0.9}, {"layer": 0, "fall": 0.2}, {"layer": 1, "fall": -0.1}]}


@pytest.fixture
def ranking(tmp_path):
    """Writes a ranking and returns its path."""

    def write(content, name="ranking.json"):
        file = tmp_path / name
        file.write_text(content if isinstance(content, str) else json.dumps(content))
        return str(file)

    return write


def rule(path, budget=0.5, tokens=100, **changes):
    return LRSAConfig(**{"sink_size": 2, "lag_size": 8, "top_k": 2} | changes,
                      head_top_k={"ranking": path, "budget": budget, "tokens": tokens})  # fmt: skip


def held(config, tokens):
    """Pairs of all heads together."""
    return sum(tokens if layer in config.dense_layers else stored_size(tokens, config.rule.replace(top_k=top_k))
               for layer, row in enumerate(config.head_top_k) for top_k in row)  # fmt: skip


@given(data=st.data())
def test_one_more_dense_head_would_exceed_the_share(data, tmp_path_factory):
    layers, heads, lag = data.draw(st.integers(1, 7)), data.draw(st.integers(1, 5)), data.draw(st.integers(2, 40))
    worths = [[data.draw(st.floats(0, 1)) for _ in range(heads)] for _ in range(layers)]
    file = tmp_path_factory.mktemp("gates") / "gates.json"
    file.write_text(json.dumps(worths))
    tokens, share = data.draw(st.integers(1, 5000)), data.draw(st.integers(1, 1000)) / 1000
    dense = tuple(data.draw(st.sets(st.integers(0, layers - 1), max_size=2)))
    options = {"sink_size": data.draw(st.integers(0, 20)), "lag_size": lag, "dense_layers": dense}
    options["top_k"] = data.draw(st.integers(0, lag))
    allowed = Fraction(str(share)) * tokens * layers * heads
    sparse = stored_size(tokens, LRSAConfig(**options).rule)
    least = len(dense) * heads * tokens + (layers - len(dense)) * heads * sparse
    if least > allowed:
        with refused("head_top_k.budget", allowed=f"at least {least / (tokens * layers * heads):.3f}"[:-1]):
            rule(str(file), share, tokens, **options)
        return
    config = rule(str(file), share, tokens, **options)
    assert held(config, tokens) <= allowed
    ranked = sorted((layer not in dense, -worths[layer][head], layer, head)
                    for layer in range(layers) for head in range(heads))  # fmt: skip
    kept = [config.head_top_k[layer][head] for _, _, layer, head in ranked]
    count = kept.count(lag)
    assert kept == [lag] * count + [options["top_k"]] * (len(kept) - count)
    if sparse < tokens and count < len(kept):
        assert held(config, tokens) + tokens - sparse > allowed


@pytest.mark.parametrize("content", [GATES, HEADS, "0.9\t0.1\n0.4\t1.0\n0.4 0.2\n"], ids=["gates", "ablation", "table"])
def test_any_file_of_heads_ranks_them(content, ranking):
    path = ranking(content)
    # Of 100 tokens a sparse head holds 2 + 2 * 11 + 10, and a dense one 66 more.
    for count, budget in enumerate((0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)):
        config = rule(path, budget)
        assert {place for place in ORDER if config.head_top_k[place[0]][place[1]] == 8} == set(ORDER[:count])
        assert LRSAConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
        full = DuoAttention(path, {"budget": budget, "tokens": 100}, sink_size=10, recent=30).full
        assert {place for place in ORDER if full[place[0]][place[1]]} == set(ORDER[:count])


def test_a_file_of_layers_ranks_them(ranking):
    assert rule(ranking(LAYERS), 0.61).head_top_k == (2, 2, 8)
    assert rule(ranking(LAYERS), 0.8, top_k=0).head_top_k == (8, 0, 8)
    with refused("gates", allowed="a list per layer"):
        DuoAttention(ranking(LAYERS))


@pytest.mark.parametrize("dense", [(), (2,)])
def test_the_bytes_of_a_cache_are_within_the_share(dense, ranking):
    model = tiny_model(num_layers=3, num_heads=4, num_kv_heads=2, hidden_size=32)
    prompt = torch.randint(3, 259, (1, 100), generator=torch.Generator().manual_seed(0))
    config = rule(ranking(GATES), 0.75, dense_layers=dense)
    duo = LRSAConfig(system=DuoAttention(GATES, {"budget": 0.75, "tokens": 100}, sink_size=10, recent=30))
    for each, wanted in ((config, (3 * 34 + 300) / 600), (duo, (3 * 40 + 300) / 600)):
        with using(model, each), torch.no_grad():
            cache = LRSACache.of(model)
            prefill(model, prompt, cache, tokens_per_call=37)
            cache.end_prompt()
        (found,) = cache.measured(1)
        assert found.held / found.dense == pytest.approx(wanted)


@pytest.mark.parametrize(
    ("changes", "field", "said"),
    [
        ({"budget": 0.33}, "head_top_k.budget", "at least 0.3400 at 100 tokens, where K = 2 holds 34 pairs per head"),
        ({"budget": 0.33, "top_k": 1}, "", ""),
        ({"budget": 0.5, "dense_layers": (0,)}, "head_top_k.budget", "at least 0.5600 at 100 tokens"),
        ({"budget": 0.99, "tokens": 17}, "head_top_k.budget", "at least 1.0000 at 17 tokens"),
        ({"budget": 0}, "head_top_k.budget", "above 0 and at most 1"),
        ({"budget": "half"}, "head_top_k.budget", "above 0 and at most 1"),
        ({"tokens": 0}, "head_top_k.tokens", "an integer >= 1"),
        ({"tokens": True}, "head_top_k.tokens", "an integer >= 1"),
    ],
)
def test_a_share_below_what_always_stays_is_refused_with_the_floor(changes, field, said, ranking):
    if not field:
        assert rule(ranking(GATES), **changes)
        return
    with refused(field, allowed=said):
        rule(ranking(GATES), **changes)


def test_a_share_below_sinks_and_recent_tokens_is_refused():
    with refused("sparsity.budget", 0.25, "at least 0.4000 at 100 tokens"):
        DuoAttention(GATES, {"budget": 0.25, "tokens": 100}, sink_size=10, recent=30)
    with refused("sparsity", allowed="settings with budget, tokens"):
        DuoAttention(GATES, {"budget": 0.25})


@pytest.mark.parametrize("compressor", [QueryAttention(window=2), Centroids()])
def test_compressors_that_hold_more_than_pairs_are_refused(compressor, ranking):
    with refused("head_top_k.budget", 0.5, reason=f"{type(compressor).__name__}, which holds more than pairs"):
        rule(ranking(GATES), compressor=compressor)


@pytest.mark.parametrize(
    ("content", "reason"),
    [("{}", "neither gates nor"), ('{"worths": [[NaN]]}', "neither gates nor"), ("[]", "ranks neither"),
     ("[[0.1], [0.2, 0.3]]", "ranks neither"), ("one two", "neither JSON nor a table"), ('{"ranking": 3}', "neither"),
     ('{"worths": [[1], [2, 3]]}', "neither"), ("[" * 100_000, "neither"),
     ('{"ranking": [{"layer": 1, "fall": 0.5}]}', "neither"), ('{"worths": [["a"]]}', "neither")],
)  # fmt: skip
def test_what_ranks_nothing_is_refused(content, reason, ranking):
    path = ranking(content)
    with refused("head_top_k.ranking", path, reason=reason):
        rule(path)
    with refused("head_top_k.ranking", reason="cannot be read"):
        rule("nowhere.json")
    with refused("head_top_k", allowed="settings with budget, ranking, tokens"):
        LRSAConfig(head_top_k={"ranking": path, "budget": 0.5})
    with refused("head_top_k.ranking", 3, "the path of a file"):
        rule(3)
