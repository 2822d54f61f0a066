"""Squeezed Attention: recorded clusters, thresholds and lookups, and what single tokens read."""

import json
from pathlib import Path

import pytest
import torch
from helpers import refused

from lrsa_lit.attention import LRSACache, LRSAConfig, cache_argument, prefill, using
from lrsa_lit.systems import Place, SqueezedAttention
from lrsa_lit.systems.clusters import Level

RECORDED = json.loads((Path(__file__).parents[1] / "vectors/systems/squeezed.json").read_text())
KEYS, OBSERVED, USER = (torch.tensor(RECORDED["inputs"][name]).double() for name in ("keys", "q_obs", "q_user"))
EXPECTED = RECORDED["expected"]


def indexed(system):
    """The streams of both layers, whose prompt has ended."""
    streams = [system.stream(Place(layer), "eager") for layer in range(2)]
    for stream, keys, queries in zip(streams, KEYS, OBSERVED, strict=True):
        query = torch.nn.functional.pad(queries, (0, 0, 12, 0))[None]
        stream.attend(query, keys[None], keys[None], 0.5)
    system.end_prompt(streams)
    return streams


@pytest.mark.parametrize("limit", ["ops.sparse_attention.clustering._DISTANCES", "systems.squeezed._NUMBERS"])
def test_clusters_do_not_depend_on_what_is_in_memory_at_a_time(limit, monkeypatch):
    """Distances are computed for a few keys at a time, and layers are clustered together or one by one."""
    system = SqueezedAttention(0.7, observed=4, clusters=1 / 3, coarse=1 / 6)
    whole = indexed(system)
    monkeypatch.setattr(f"lrsa_lit.{limit}", 40)
    for stream, other in zip(whole, indexed(system), strict=True):
        torch.testing.assert_close(stream.levels, other.levels)
        torch.testing.assert_close(stream.thresholds, other.thresholds)


def kept(stream, layer, queries):
    """The positions that each head reads for some of the user's queries."""
    found = stream.lookup(USER[layer][None, :, None, queries], 0.5)[0]
    return [head.nonzero()[:, 0].tolist() for head in found]


@pytest.mark.parametrize("share", ["0.5", "0.7", "0.9"])
def test_clusters_thresholds_and_lookups_are_the_recorded_ones(share):
    streams = indexed(SqueezedAttention(float(share), observed=4, clusters=0.25))
    for layer, stream in enumerate(streams):
        (level,) = stream.levels
        assert level.labels[0].tolist() == EXPECTED["labels"][layer]
        torch.testing.assert_close(level.centroids[0], torch.tensor(EXPECTED["centroids"][layer]).double())
        assert stream.thresholds[0].item() == pytest.approx(EXPECTED["tau"][share], abs=1e-7)
        for number in range(2):
            wanted = [head[number] for head in EXPECTED["kept_single_query"][share][layer]]
            assert kept(stream, layer, slice(number, number + 1)) == wanted
        assert kept(stream, layer, slice(None)) == EXPECTED["kept_both_queries_averaged"][share][layer]


def test_clusters_without_keys_take_nothing_from_the_others():
    """Keys as large as some models have: beside the first cluster the others' exponentials are 0 in float32."""
    level = Level(torch.tensor([[[0, 0, 1, 2]]]), torch.tensor([[[[400.0, 0.0], [0.0, 1.0], [0.0, 2.0]]]]))
    query, alive = torch.tensor([[[[[1.0, 1.0]]]]]), torch.tensor([[[False, False, True, True]]])
    found = level.member_probabilities(query, 1.0, alive)[0, 0, 2:]
    torch.testing.assert_close(found, torch.tensor([1.0, 2.0]).softmax(dim=0))
    assert (level.member_probabilities(query, 1.0, torch.zeros_like(alive)) < 0).all()


def test_two_levels_are_the_recorded_ones():
    expected = EXPECTED["hierarchical"]
    streams = indexed(SqueezedAttention(0.7, observed=4, clusters=1 / 3, coarse=1 / 6))
    for layer, stream in enumerate(streams):
        coarse, fine = stream.levels
        assert fine.labels[0].tolist() == expected["labels2"][layer]
        torch.testing.assert_close(coarse.centroids[0], torch.tensor(expected["centroids1"][layer]).double())
        assert [float(value) for value in stream.thresholds] == pytest.approx([expected["tau1"], expected["tau2"]])
        for number in range(2):
            wanted = [head[number][1] for head in expected["kept"][layer]]
            assert kept(stream, layer, slice(number, number + 1)) == wanted


def test_single_tokens_attend_to_what_they_read_and_nothing_else():
    (stream, _) = indexed(SqueezedAttention(0.7, observed=4, clusters=0.25))
    query, new = USER[0][None, :, :1], torch.randn(1, 2, 1, 4, dtype=torch.float64)
    output = stream.attend(query, new, new, 0.5)
    everything = torch.cat([KEYS[0][None], new], dim=2)
    for head, positions in enumerate(kept(stream, 0, slice(0, 1))):
        seen = everything[:, head, [*positions, *range(12, 17)]]
        weights = (query[:, head] @ seen.mT * 0.5).softmax(dim=-1)
        torch.testing.assert_close(output[:, head], weights @ seen)
        assert stream.reads[-1][0, head] == len(positions) + 5 + 3 / 2


def logits_of(model, system, prompt, more):
    with using(model, LRSAConfig(system=system)), torch.no_grad():
        cache = LRSACache.of(model)
        prefill(model, prompt, cache)
        cache.end_prompt()
        return model(more, use_cache=True, **cache_argument(model, cache)).logits


@pytest.mark.parametrize(("sparsity", "coarse"), [(0.0, None), (0.9, None), (0.9, 0.05)])
def test_a_model_answers_from_what_is_read(sparsity, coarse, model, ids):
    prompt, more = ids(2, 40), ids(2, 3)
    with torch.no_grad():
        dense = model(torch.cat([prompt, more], dim=1)).logits[:, 40:]
    system = SqueezedAttention(sparsity, observed=6, clusters=0.2, coarse=coarse)
    difference = (logits_of(model, system, prompt, more) - dense).abs().max()
    assert difference > 1e-3


def test_a_prompt_of_observed_tokens_alone_is_read_whole(model, ids):
    prompt, more = ids(2, 6), ids(2, 3)
    with torch.no_grad():
        dense = model(torch.cat([prompt, more], dim=1)).logits[:, 6:]
    found = logits_of(model, SqueezedAttention(0.9, observed=6), prompt, more)
    torch.testing.assert_close(found, dense, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "pads", [(0, 8, 3, 16), (0, 4, 25, 35), (0, 0, 0, 0)], ids=["indexed", "some without an index", "of one length"]
)
@pytest.mark.parametrize("coarse", [None, 0.1])
def test_rows_of_unequal_lengths_answer_together_as_each_does_alone(coarse, pads, model, ids, monkeypatch):
    """Each reads what it reads alone, also where their memory is full or another turn comes in between."""
    monkeypatch.setattr("lrsa_lit.systems.squeezed_rows._ROOM", 2)
    system = SqueezedAttention(0.6, observed=6, clusters=0.3, coarse=coarse)
    prompt, answer = ids(4, 40), ids(4, 9)
    mask = (torch.arange(40) >= torch.tensor(pads)[:, None]).long()

    def said(rows, prompt, mask):
        cache, logits = LRSACache.of(model), []
        prefill(model, prompt * mask, cache, attention_mask=mask)
        cache.end_prompt()
        for tokens in answer[rows].split([1, 1, 1, 2, 1, 1, 1, 1], dim=1):
            logits.append(model(tokens, use_cache=True, **cache_argument(model, cache)).logits)
        return torch.cat(logits, dim=1), cache.measured(len(mask))

    with using(model, LRSAConfig(system=system, dense_layers=(1,))), torch.no_grad():
        together, measured = said(slice(None), prompt, mask)
        for row, begin in enumerate(pads):
            own = slice(row, row + 1)
            alone, (cost,) = said(own, prompt[own, begin:], mask[own, begin:])
            torch.testing.assert_close(together[own], alone, rtol=0, atol=1e-8)
            assert measured[row] == pytest.approx(cost)


@pytest.mark.parametrize(
    "arguments", [{"sparsity": 1.0}, {"observed": 0}, {"clusters": 0.0}, {"clusters": 0.01, "coarse": 0.05}]
)
def test_settings_beyond_their_bounds_are_refused(arguments):
    *_, (field, value) = arguments.items()
    with refused(field, value):
        SqueezedAttention(**arguments)
