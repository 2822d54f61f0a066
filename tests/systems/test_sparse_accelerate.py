"""The three prefill masks: recorded recalls and choices, pairs, prompts in one call."""

import json
from pathlib import Path

import pytest
import torch
from helpers import refused

from lrsa_lit.attention import LRSACache, LRSAConfig, cache_argument, prefill, using
from lrsa_lit.systems import Place, SparseAccelerate
from lrsa_lit.systems.sparse_accelerate import PATTERNS, Masks

RECORDED = json.loads((Path(__file__).parents[1] / "vectors/systems/sparseaccelerate.json").read_text())
QUERY, KEY = (torch.tensor(RECORDED["inputs"][name]).double() for name in "qk")
SYSTEM = SparseAccelerate(
    initial=2, local=3, columns=4, diagonals=3, last_queries=4, first_columns=2, near_diagonals=2, block=4, blocks=2,
    recall_from=8,
)  # fmt: skip


@pytest.fixture(params=[16, 5], ids=["at once", "in parts"])
def of_queries(request, monkeypatch):
    """How many queries of the recorded prompt have masks at a time."""
    monkeypatch.setattr("lrsa_lit.systems.at_once._PROBABILITIES", 2 * 16 * request.param)


@pytest.mark.usefixtures("of_queries")
def test_recalls_are_the_recorded_ones():
    found = Masks(SYSTEM, QUERY[None, :, None], KEY[None], 0.5).recalls()[:, 0, :, 0]
    for head, expected in enumerate(RECORDED["expected"]):
        wanted = [expected["recall"][name] for name in PATTERNS]
        assert found[:, head].tolist() == pytest.approx(wanted, abs=1e-7)


@pytest.mark.usefixtures("of_queries")
def test_each_head_attends_through_its_pattern():
    stream = SYSTEM.stream(Place(0), "eager")
    output = stream.attend(QUERY[None], KEY[None], KEY[None], 0.5)
    assert [PATTERNS[number] for number in stream.patterns.flatten().tolist()] == ["block_cluster", "interval_slash"]
    places = torch.arange(16)
    causal = places <= places[:, None]
    blocks = torch.zeros(4, 4, dtype=torch.bool)
    for row, columns in enumerate(RECORDED["expected"][0]["key_blocks_of_query_block"]):
        blocks[row, columns] = True
    columns, slashes = (torch.tensor(RECORDED["expected"][1][name]) for name in ("verticals", "slashes"))
    slashed = torch.isin(places, columns) | torch.isin(places[:, None] - places, slashes)
    for head, mask in enumerate((blocks.repeat_interleave(4, 0).repeat_interleave(4, 1), slashed)):
        seen = causal & mask
        scores = (QUERY[head] @ KEY[head].mT * 0.5).masked_fill(~seen, -torch.inf)
        torch.testing.assert_close(output[0, head], scores.softmax(dim=-1) @ KEY[head])
        assert stream.attended[0, head].item() == seen.sum()


def logits_of(model, system, prompt, more, mask=None):
    with using(model, LRSAConfig(system=system)), torch.no_grad():
        cache = LRSACache.of(model)
        prefill(model, prompt, cache, attention_mask=mask, tokens_per_call=4)
        cache.end_prompt()
        every = None if mask is None else torch.cat([mask, torch.ones_like(more)], dim=1)
        return model(more, attention_mask=every, use_cache=True, **cache_argument(model, cache)).logits


def test_masks_that_hold_everything_are_dense_attention(model, ids):
    prompt, more = ids(2, 30), ids(2, 3)
    with torch.no_grad():
        dense = model(torch.cat([prompt, more], dim=1)).logits[:, 30:]
    whole = logits_of(model, SparseAccelerate(), prompt, more)
    torch.testing.assert_close(whole, dense, rtol=0, atol=1e-6)
    assert (logits_of(model, SYSTEM, prompt, more) - dense).abs().max() > 1e-3


def test_padded_rows_get_what_each_gets_alone(model, ids):
    prompt, more = ids(2, 30), ids(2, 3)
    mask = (torch.arange(30) >= torch.tensor([[0], [9]])).long()
    together = logits_of(model, SYSTEM, prompt * mask, more, mask)
    for row, start in enumerate((0, 9)):
        alone = logits_of(model, SYSTEM, prompt[row : row + 1, start:], more[row : row + 1])
        torch.testing.assert_close(together[row], alone[0], rtol=0, atol=1e-6)


def test_rows_of_one_length_count_the_pairs_that_each_has_alone(model, ids):
    prompt = ids(5, 23)

    def pairs_of(prompt):
        cache = LRSACache.of(model)
        prefill(model, prompt, cache)
        return [row.pairs for row in cache.measured(len(prompt))]

    with using(model, LRSAConfig(system=SYSTEM)), torch.no_grad():
        together = pairs_of(prompt)
        assert len(set(together)) > 1
        assert together == pytest.approx([pairs_of(row[None])[0] for row in prompt])


def test_a_prompt_in_several_calls_is_refused(model, ids):
    prompt = ids(1, 20)
    with using(model, LRSAConfig(system=SYSTEM)), torch.no_grad():
        cache = LRSACache.of(model)
        model(prompt[:, :12], use_cache=True, **cache_argument(model, cache))
        with refused("input_ids"):
            model(prompt[:, 12:], use_cache=True, **cache_argument(model, cache))
