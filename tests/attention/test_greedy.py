"""Greedy answers of one batch of prompts after another: the same as with a cache of their own."""

import functools

import pytest
import torch

from lrsa_lit.attention import Greedy, LRSACache, LRSAConfig, enable, greedy_tokens, prefill, single_token_steps
from lrsa_lit.attention.decoding import Decoder, greedy
from lrsa_lit.models.tiny import tiny_model
from lrsa_lit.ops.sparse_attention import (
    Centroids,
    MeanPool,
    RandomTokens,
    Recency,
    Strided,
    TokenGate,
    ValueRelative,
)

RULE = LRSAConfig(sink_size=2, lag_size=8, top_k=3)
LENGTHS = (30, 61, 18, 75, 44)
CHANGES = {
    "rule": {},
    "chunk": {"chunk_size": 20},
    "none": {"top_k": 0},
    "layer": {"dense_layers": (1,)},
    "dense": {"dense_layers": (0, 1)},
    "mean": {"compressor": MeanPool()},
    "clusters": {"compressor": Centroids(2)},
    "random": {"compressor": RandomTokens(3)},
    "gates": {"compressor": TokenGate()},
    "recent": {"compressor": Recency()},
    "strided": {"compressor": Strided()},
    "values": {"compressor": ValueRelative()},
}


def prompts(rows=1):
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, 259, (rows, length), generator=generator) for length in LENGTHS]


def generated(model, prompt, stop, mask=None):
    """What ``generate`` says, row by row, up to the stop."""
    options = {"do_sample": False, "max_new_tokens": 20, "eos_token_id": stop, "pad_token_id": stop}
    mask = torch.ones_like(prompt) if mask is None else mask
    whole = model.generate(prompt, attention_mask=mask, past_key_values=LRSACache.of(model), **options)
    return [until(row, stop) for row in whole[:, prompt.shape[1] :].tolist()]


def until(tokens, stop):
    return tokens[: tokens.index(stop)] if stop in tokens else tokens


@pytest.fixture(params=[False, True], ids=["plain", "decoder"])
def prepared(request, monkeypatch):
    """With and without the memory that CUDA graphs need; how often it was made."""
    made = []
    if request.param:
        prepare = Decoder._prepare
        monkeypatch.setattr(Decoder, "_prepare", lambda *given: (made.append(1), prepare(*given))[1])
        monkeypatch.setattr(
            greedy,
            "single_token_steps",
            lambda model, cache, **sizes: Decoder(model, cache, **sizes).step,
        )
    return made


@functools.cache
def changed(change):
    """A model with another rule, and what it says to each prompt, with and without that memory."""
    model = enable(tiny_model().eval(), RULE.replace(**CHANGES[change]))
    return model, [generated(model, prompt, 2) for prompt in prompts()]


@pytest.mark.parametrize("change", CHANGES)
def test_answers_are_those_of_generate_in_one_memory(change, prepared):
    model, expected = changed(change)
    answers = Greedy(model, [2], max_new_tokens=20, longest_prompt=max(LENGTHS))
    assert [answers(prompt) for prompt in prompts()] == expected
    assert len(prepared) <= 1


def test_memory_grows_where_nobody_said_how_long_prompts_are(prepared):
    model = enable(tiny_model().eval(), RULE.replace(top_k=8))
    answers = Greedy(model, [2], max_new_tokens=20)
    for prompt in prompts():
        assert answers(prompt) == generated(model, prompt, 2)
    assert len(prepared) in (0, 3), "for prompts of 30, 61 and 75 tokens"


@pytest.mark.parametrize("change", ["rule", "random", "dense"])
@pytest.mark.parametrize("rows", [2, 3, 5])
def test_answers_do_not_depend_on_who_else_is_answered(change, rows, prepared):
    model = enable(tiny_model().eval(), RULE.replace(**CHANGES[change]))
    for batch in prompts(rows):
        # An end that some rows reach before others.
        (stop, *_) = Greedy(model, [], max_new_tokens=20)(batch[:1])[0][7:]
        answers = Greedy(model, [stop], max_new_tokens=20)
        assert answers(batch) == [answers(prompt[None])[0] for prompt in batch]


def test_prompts_of_unequal_lengths_are_padded_on_the_left(prepared):
    model = enable(tiny_model().eval(), RULE)
    batch, mask = prompts(3)[3], torch.ones(3, 75, dtype=torch.long)
    mask[0, :31] = mask[2, :60] = 0
    answers = Greedy(model, [2], max_new_tokens=20)
    together = answers(batch, mask)
    assert together == generated(model, batch, 2, mask)
    assert together == [answers(batch[row, None, start:])[0] for row, start in enumerate((31, 0, 60))]


def test_an_answer_ends_before_its_stop():
    model = enable(tiny_model().eval(), RULE)
    (prompt, *_) = prompts()
    (answer,) = Greedy(model, [], max_new_tokens=12)(prompt)
    assert len(answer) == 12
    assert Greedy(model, [answer[5]], max_new_tokens=12)(prompt) == [until(answer, answer[5])]
    assert len(Greedy(model, [], max_new_tokens=1)(prompt)[0]) == 1


@pytest.mark.parametrize("rule", [RULE, None], ids=["rule", "stock"])
def test_a_cache_goes_on_after_an_answer(rule):
    model = tiny_model().eval()
    cache = LRSACache.of(enable(model, rule)) if rule else LRSACache.of(model, RULE)
    step, text = single_token_steps(model, cache), torch.empty(1, 0, dtype=torch.long)
    for prompt in prompts()[:3]:
        text = torch.cat([text, prompt], dim=1)
        logits = prefill(model, text[:, cache.get_seq_length() :], cache)
        new = list(greedy_tokens(logits, step, [], most=6))
        fresh = LRSACache.of(model) if rule else LRSACache.of(model, RULE)
        expected = greedy_tokens(prefill(model, text, fresh), single_token_steps(model, fresh), [], most=6)
        assert new == list(expected)
        text = torch.cat([text, torch.tensor(new).T], dim=1)
        assert cache.get_seq_length() == text.shape[1] - 1
