"""Products at a budget: the largest sizes whose bytes, of the prompt before it was shortened, are within it."""

import dataclasses
import json
import math

import pytest
import torch
from helpers import refused
from hypothesis import assume, given
from hypothesis import strategies as st

from lrsa_lit.attention import LRSACache, LRSAConfig, cache_share, enable, head_of, prefill, using
from lrsa_lit.data.summary_file import line_of
from lrsa_lit.errors import UserError
from lrsa_lit.experiments.product_names import products_of
from lrsa_lit.models.factors import factor
from lrsa_lit.models.tiny import tiny_config, tiny_model

RULE = LRSAConfig(sink_size=4, lag_size=8, top_k=2)
LAYERS, KV_HEADS = 2, 2
CONFIG = tiny_config(num_layers=LAYERS, num_heads=4, num_kv_heads=2, hidden_size=32)
HEAD = head_of(CONFIG, 4)


def product(text):
    return products_of([text], RULE)[0][0]


def held(sized, tokens):
    """Bytes at the end of a prompt of so many tokens, as a share of what a dense cache holds of all of them."""
    left = tokens if sized.shortens is None else math.floor(sized.shortens.kept * tokens + 1e-9)
    head = HEAD
    if sized.narrow is not None:
        head = dataclasses.replace(head, latent=sized.narrow.latent_bytes(CONFIG, HEAD.itemsize))
    share = 1.0 if sized.attention is None else cache_share(sized.attention, left, LAYERS, head)
    return left / tokens * share


@given(
    st.sampled_from(["Truncate@{}*LagRelative", "LoRC@{}*LagRelative", "Truncate@{}*KeyNorm", "Truncate*LagRelative@{}",
                     "Truncate@{}*LoRC", "LoRC*LagRelative@{}", "Truncate@{}*LoRC@{}*LagRelative"]),
    st.floats(0.2, 0.95),
    st.floats(0.05, 0.9),
    st.integers(50, 3000),
)  # fmt: skip
def test_a_product_holds_no_more_than_its_budget_and_a_size_more_would(text, share, budget, tokens):
    asked = product(text.replace("{}", f"{share:.3f}"))
    try:
        sized = asked.at(budget, tokens, CONFIG, HEAD)
    except UserError:
        assume(False)
    assert held(sized, tokens) <= budget + 1e-9
    rest = asked.factors[-1]
    if rest.share is None and asked.attention is not None and sized.attention.system is None:
        more = sized.attention.top_k + 1
        larger = sized._replace(attention=sized.attention.replace(top_k=more)) if more <= RULE.lag_size else None
        assert larger is None or held(larger, tokens) > budget
    elif rest.share is None and asked.narrow is rest:
        rank = sized.narrow.rank + 1
        larger = sized._replace(narrow=dataclasses.replace(sized.narrow, rank=rank))
        assert rank > sized.narrow.width(CONFIG) or held(larger, tokens) > budget * (1 - 1 / tokens)


@pytest.mark.parametrize(
    "text", ["LoRC", "Truncate@0.6*LagRelative", "LoRC@0.6*LagRelative", "Truncate@0.7*LoRC@0.7*LagRelative"]
)
def test_the_bytes_are_those_of_a_cache(text):
    tokens, budget = 200, 0.4
    sized = product(text).at(budget, tokens, CONFIG, HEAD)
    model = tiny_model(num_layers=LAYERS, num_heads=4, num_kv_heads=2, hidden_size=32).eval()
    if sized.narrow is not None:
        factor(model, sized.narrow)
    enable(model, RULE)
    left = tokens if sized.shortens is None else math.floor(sized.shortens.kept * tokens)
    prompts = torch.randint(3, 259, (1, left), generator=torch.Generator().manual_seed(0))
    with using(model, sized.attention), torch.no_grad():
        cache = LRSACache.of(model)
        prefill(model, prompts, cache, tokens_per_call=37)
        cache.end_prompt()
    (row,) = cache.measured(1)
    allocated = sum(part.numel() * part.element_size() for layer in cache.layers for stream in layer.streams
                    for buffer in stream.buffers for part in buffer.filled)  # fmt: skip
    assert row.held == allocated
    row = row.shortened(tokens, left)
    assert row.dense == tokens * LAYERS * KV_HEADS * HEAD.pair
    assert row.held / row.dense == pytest.approx(held(sized, tokens))
    assert row.held / row.dense <= budget


def test_low_rank_takes_latents_of_each_head_beside_a_rule_unless_heads_keep_the_same_tokens():
    assert product("LoRC").narrow.part.grouping == "joint"
    assert product("LoRC@0.5*LagRelative").narrow.part.grouping == "head"
    assert product("LoRC@0.5*SharedHeads").narrow.part.grouping == "joint"


def test_names_say_what_each_factor_takes():
    asked = product("Truncate={cut: end}@0.5 * LoRC@0.25 * LagRelative")
    assert asked.words == "Truncate to 50%, then LoRC-head to 25%, then rule-LagRelative"
    assert asked.name == "Truncate_to_50_then_LoRC-head_to_25_then_rule-LagRelative"
    assert asked.shortens.part.cut == "end"


def test_what_stands_in_braces_divides_no_product():
    assert product("BM25={forced: 'a*b@0.5'}").shortens.part.forced == "a*b@0.5"


def test_controls_come_with_filters_and_low_ranks_alone():
    assert [each.words for each in products_of(["LagRelative"], RULE)[0]] == ["rule-LagRelative"]
    assert [each.words for each in products_of(["LoRC"], RULE)[0]] == ["LoRC", "Truncate", "RandomSentences"]


def test_a_filter_without_a_budget_is_compared_alone(tmp_path):
    file = tmp_path / "map.jsonl"
    file.write_text(json.dumps(line_of("A town.", "somebody", "Town.")))
    assert not product(f"Summaries={{map: {file}}}").has_budget
    text = f"Summaries={{map: {file}}}@0.5*LagRelative"
    with refused("--systems", text, reason="whose size no budget can set"):
        product(text)
