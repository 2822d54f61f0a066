"""KVzip: scores of a pass that leaves the cache as it was, and a cut that is uneven over heads and layers."""

import contextlib
import itertools

import pytest
import torch
from helpers import refused
from systems.recorded import vectors

from lrsa_lit.attention import (
    Greedy,
    LRSACache,
    LRSAConfig,
    at_budget,
    cache_argument,
    end_prompt,
    head_of,
    prefill,
    shares,
    using,
)
from lrsa_lit.attention.decoding.end_of_prompt import _read
from lrsa_lit.systems import ChunkKVPress, KVzip, at_once
from lrsa_lit.systems.kvzip import repeat_scores

PROMPT, ANSWER, LAYERS, HEADS, DIM = 23, 5, 3, 2, 8
SMALL = {"sink_size": 2, "chunk": 9, "first": "a", "later": "bc", "suffix": "d"}


def encode(text):
    return [10 + ord(letter) - ord("a") for letter in text]


def filled(model, prompt):
    cache = LRSACache.of(model)
    prefill(model, prompt, cache)
    return cache


@pytest.fixture
def enabled(model):
    """Switches the model to KVzip with some options."""
    with contextlib.ExitStack() as stack, torch.no_grad():
        yield lambda **options: stack.enter_context(using(model, LRSAConfig(system=KVzip(**SMALL | options))))


def recorded():
    given = vectors("kvzip")["inputs"]
    first, keys, second, own = (
        torch.tensor(given[name], dtype=torch.float64)[None]
        for name in ("q_repeat_1", "keys", "q_repeat_2", "k_repeat_2")
    )
    past, sinks = keys[:, :, :12], keys[:, :, :2]
    yield repeat_scores(first, past[:, :, :7], keys[:, :, 12:], 2, 0.5)
    yield repeat_scores(second, torch.cat([sinks, past[:, :, 7:]], dim=2), own, 2, 0.5)


@pytest.mark.parametrize("probabilities", [1, 150, 1 << 26], ids=["of one query", "of a few", "of all"])
def test_recorded_scores_and_the_pairs_that_stay(probabilities, monkeypatch):
    monkeypatch.setattr(at_once, "_PROBABILITIES", probabilities)
    found, expected = list(recorded()), vectors("kvzip")["expected"]
    for scores, name in zip(found, ("scores_chunk_1", "scores_chunk_2"), strict=True):
        torch.testing.assert_close(scores[0], torch.tensor(expected[name], dtype=torch.float64), rtol=0, atol=1e-7)
    scores = torch.nn.functional.pad(torch.cat(found, dim=2), (2, 0), value=2.0)
    (kept,) = KVzip(pairs=7, sink_size=2).share_out([scores])
    assert [head[head >= 0].tolist() for head in kept] == [[0, 1, *positions] for positions in expected["kept"]]


def test_ties_go_to_the_earlier_layer_head_and_token():
    kept = KVzip(pairs=3, sink_size=0).share_out([torch.zeros(1, 2, 4)] * 2)
    assert kept.tolist() == [[[0, 1, 2, 3], [0, 1, 2, 3]], [[0, 1, 2, 3], [-1, -1, -1, -1]]]


def expected_scores(model, prompt):
    """(layers, H, T - S): a dense pass over the prompt and what is read, its probabilities among fewer keys."""
    parts = [(2, 11, "a"), (11, 20, "bc"), (20, 23, "bc")]
    found = []
    model.set_attn_implementation("eager")
    for start, stop, asked in parts:
        named = prompt[start - 8 : start] if start > 2 else prompt[:0]
        ids = torch.cat([prompt, torch.tensor(encode(asked)), named, torch.tensor(encode("d")), prompt[start:stop]])
        given = torch.stack(model(ids[None], output_attentions=True).attentions)[:, 0, :, PROMPT:].double()
        among = [0, 1, *range(start, stop), *range(PROMPT, len(ids))]
        given = given[..., among] / given[..., among].sum(dim=-1, keepdim=True)
        found.append(given.unflatten(1, (HEADS, -1)).amax(dim=(2, 3))[..., 2 : 2 + stop - start])
    model.set_attn_implementation("sdpa")
    return torch.cat(found, dim=-1)


@pytest.mark.parametrize("per_layer", [False, True])
def test_scores_are_those_of_dense_passes_over_the_prompt_and_what_is_read(per_layer, model, ids, enabled, monkeypatch):
    (prompt,) = ids(1, PROMPT)
    with torch.no_grad():
        expected = expected_scores(model, prompt)
    enabled(pairs=8, per_layer=per_layer)
    seen, share_out = [], KVzip.share_out
    monkeypatch.setattr(KVzip, "share_out", lambda self, scores: seen.extend(scores) or share_out(self, scores))
    cache = filled(model, prompt[None])
    end_prompt(model, cache, prompt[None], encode=encode)
    # transformers' own softmax is in float32.
    torch.testing.assert_close(torch.cat(seen)[:, :, 2:], expected, rtol=0, atol=1e-6)
    shares = [[layer] for layer in expected] if per_layer else [list(expected)]
    kept = [layer.streams[0].kept[0] for layer in cache.layers]
    for share, layers in zip(shares, [[each] for each in kept] if per_layer else [kept], strict=True):
        left = torch.stack(share).flatten().sort(descending=True).values[: len(share) * HEADS * 6]
        for scores, heads in zip(share, layers, strict=True):
            for row, positions in zip(scores, heads, strict=True):
                assert positions[positions >= 0].tolist() == [0, 1, *(2 + (row >= left[-1]).nonzero()[:, 0]).tolist()]


@pytest.mark.parametrize("rows", [1, 2])
def test_the_pass_leaves_the_cache_as_it_was(rows, model, ids, enabled, monkeypatch):
    enabled()
    prompt, answer = ids(rows, PROMPT), ids(rows, ANSWER)
    untouched, cache = filled(model, prompt), filled(model, prompt)
    monkeypatch.setattr(LRSACache, "end_prompt", lambda self, to_come: None)
    end_prompt(model, cache, prompt, encode=encode)
    assert cache.is_idle
    assert cache.get_seq_length() == PROMPT
    for layer, other in zip(cache.layers, untouched.layers, strict=True):
        assert layer.progress == other.progress
        assert all(map(torch.equal, layer.streams[0].stored, other.streams[0].stored))
    both = (model(answer, **cache_argument(model, each)).logits for each in (cache, untouched))
    assert torch.equal(*both)


@pytest.mark.parametrize("per_layer", [False, True])
def test_budgets_are_met_to_the_byte(per_layer, model, ids, enabled):
    enabled(kept=0.4, per_layer=per_layer)
    prompt = ids(2, PROMPT)
    cache = filled(model, prompt)
    end_prompt(model, cache, prompt, encode=encode)
    pair = 2 * DIM * 8
    assert cache.nbytes == 2 * LAYERS * HEADS * int(0.4 * PROMPT) * pair
    layers = [layer.nbytes for layer in cache.layers]
    assert (len(set(layers)) == 1) is per_layer
    assert any(len(stream.parts) > 1 for layer in cache.layers for stream in layer.streams)


def test_what_it_takes_is_measured_with_the_pass(model, ids):
    config = at_budget(
        LRSAConfig(system=KVzip(**SMALL), dense_layers=(1,)), 0.6, PROMPT, LAYERS, head_of(model.config, 8)
    )
    assert config.system.pairs == int((0.6 * LAYERS - 1) * PROMPT / 2)
    with using(model, config):
        greedy = Greedy(model, stops=(), max_new_tokens=1, encode=encode)
        greedy(ids(2, PROMPT))
    found, repeats = shares([greedy.usage]), [2 + 9, 3 + 8 + 9, 3 + 8 + 3]
    assert found["cache"] == pytest.approx((2 * config.system.pairs + PROMPT) / (LAYERS * PROMPT))
    # Scores of all but the sinks wait in two layers; in one at a time the longest repeat stands behind a copy.
    pair, scores = 2 * DIM * 8, 2 * (PROMPT - SMALL["sink_size"]) * 8
    beside = (scores + (PROMPT + max(repeats)) * pair) / (LAYERS * PROMPT * pair)
    assert found["peak"] == pytest.approx(1 + beside)
    dense = PROMPT * (PROMPT + 1) / 2
    assert found["pairs"] == 1 + sum(count * PROMPT + count * (count + 1) / 2 for count in repeats) / dense


def test_all_kept_is_dense_and_nothing_is_read(model, ids, enabled):
    prompt, answer = ids(2, PROMPT), ids(2, ANSWER)
    with torch.no_grad():
        dense = model(torch.cat([prompt, answer], dim=1)).logits[:, PROMPT:]
    enabled(kept=1.0)
    cache = filled(model, prompt)
    end_prompt(model, cache, prompt)
    found = model(answer, **cache_argument(model, cache)).logits
    torch.testing.assert_close(found, dense, rtol=0, atol=1e-6)


def test_a_second_prompt_is_kept_whole(model, ids, enabled):
    enabled()
    prompt, more = ids(1, PROMPT), ids(1, 4)
    cache = filled(model, prompt)
    end_prompt(model, cache, prompt, encode=encode)
    held = cache.nbytes
    prefill(model, more, cache)
    end_prompt(model, cache, torch.cat([prompt, more], dim=1))
    assert cache.nbytes == held + 4 * LAYERS * HEADS * 2 * DIM * 8


def test_a_call_of_pads_alone_changes_nothing(model, ids, enabled):
    enabled()
    prompt = ids(2, PROMPT)
    cache = filled(model, prompt)
    before = [layer.progress for layer in cache.layers], cache.nbytes
    with cache.probing():
        _read(model, cache, torch.ones_like(prompt), [[], []])
    assert ([layer.progress for layer in cache.layers], cache.nbytes) == before


def test_a_pass_that_is_cut_short_needs_a_reset(model, ids, enabled, monkeypatch):
    enabled()
    prompt, calls = ids(1, PROMPT), itertools.count()
    cache = filled(model, prompt)
    monkeypatch.setattr(KVzip, "begin_repeat", lambda *given: 1 / (1 - next(calls)))
    with pytest.raises(ZeroDivisionError):
        end_prompt(model, cache, prompt, encode=encode)
    with refused("cache"):
        prefill(model, prompt, cache)
    cache.reset()
    prefill(model, prompt, cache)
    assert cache.get_seq_length() == PROMPT


def test_prompts_that_cannot_be_repeated_are_refused(model, ids, enabled, monkeypatch):
    enabled()
    prompt = ids(1, PROMPT)
    with refused("system", reason="encode"):
        Greedy(model, stops=(), max_new_tokens=2)(prompt)
    with refused("system", reason="end_prompt"):
        filled(model, prompt).end_prompt()
    cache = filled(model, prompt)
    # 3 tokens that ask, 8 that name the part, 9 of the part.
    monkeypatch.setattr(model.config, "max_position_embeddings", PROMPT + 19)
    with refused("system", reason=str(PROMPT + 20)) as caught:
        end_prompt(model, cache, prompt, encode=encode)
    assert str(PROMPT + 19) in caught.value.reason
    monkeypatch.setattr(model.config, "max_position_embeddings", PROMPT + 20)
    end_prompt(model, cache, prompt, encode=encode)


def test_fewer_pairs_than_sinks_are_refused(model, ids, enabled):
    with refused("pairs"):
        KVzip(pairs=3)
    enabled(kept=0.1, sink_size=4)
    prompt = ids(1, PROMPT)
    with refused("kept"):
        end_prompt(model, filled(model, prompt), prompt, encode=encode)


def test_it_scores_for_no_other_system():
    with refused("scorer"):
        ChunkKVPress(scorer=KVzip())
