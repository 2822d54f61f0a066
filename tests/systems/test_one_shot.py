"""One cut behind the prompt: prefill in any chunks, padding, batches, the answer behind it."""

import copy
import pickle

import pytest
import torch
from helpers import refused
from systems.recorded import vectors

from lrsa_lit.attention import Greedy, LRSACache, LRSAConfig, cache_argument, prefill, using
from lrsa_lit.attention.decoding.decoder import Decoder
from lrsa_lit.models.tiny import tiny_model
from lrsa_lit.systems import (
    AdaKV,
    ChunkKVPress,
    ExpectedAttention,
    Head,
    KeyNorm,
    LagKVPress,
    Prompt,
    SnapKV,
    StreamingLLM,
)

PROMPT, ANSWER = 23, 5


def answered(model, system, prompt, answer, *, dense=(), mask=None, calls=8192):
    """Logits (B, A, V) behind a prompt that a system has cut, and the cache."""
    with using(model, LRSAConfig(system=system, dense_layers=dense)), torch.no_grad():
        cache = LRSACache.of(model)
        prefill(model, prompt, cache, attention_mask=mask, tokens_per_call=calls)
        cache.end_prompt()
        more = None if mask is None else torch.cat([mask, torch.ones_like(answer)], dim=1)
        output = model(answer, attention_mask=more, use_cache=True, **cache_argument(model, cache))
        return output.logits, cache


@pytest.mark.parametrize("calls", [1, 4, 22])
def test_prefill_in_any_calls_is_prefill_at_once(calls, model, ids):
    prompt, answer = ids(2, PROMPT), ids(2, ANSWER)
    whole, _ = answered(model, KeyNorm(0.4), prompt, answer)
    split, _ = answered(model, KeyNorm(0.4), prompt, answer, calls=calls)
    torch.testing.assert_close(split, whole, rtol=0, atol=1e-6)


def test_what_is_kept_is_what_the_answer_sees(model, ids):
    prompt, answer = ids(2, PROMPT), ids(2, ANSWER)
    kept, cache = answered(model, StreamingLLM(pairs=9, sink_size=2), prompt, answer, dense=(1,))
    assert cache.layers[0].streams[0].kept[1, 1].tolist() == [0, 1, *range(16, 23)]
    assert cache.stored_tokens() == [2 * (9 + ANSWER), 2 * (PROMPT + ANSWER), 2 * (9 + ANSWER)]
    all_kept, _ = answered(model, StreamingLLM(1.0), prompt, answer)
    with torch.no_grad():
        dense = model(torch.cat([prompt, answer], dim=1)).logits[:, PROMPT:]
    torch.testing.assert_close(all_kept, dense, rtol=0, atol=1e-6)
    assert (kept - dense).abs().max() > 1e-3


def test_padded_rows_get_what_each_gets_alone(model, ids):
    prompt, answer = ids(3, PROMPT), ids(3, ANSWER)
    pads = [0, 6, 14]
    mask = (torch.arange(PROMPT) >= torch.tensor(pads)[:, None]).long()
    together, _ = answered(model, KeyNorm(0.5), prompt * mask, answer, mask=mask)
    for row, start in enumerate(pads):
        alone, _ = answered(model, KeyNorm(0.5), prompt[row : row + 1, start:], answer[row : row + 1])
        torch.testing.assert_close(together[row], alone[0], rtol=0, atol=1e-6)


def test_greedy_answers_follow_the_cut(model, ids):
    prompt = ids(2, PROMPT)
    with using(model, LRSAConfig(system=KeyNorm(0.3))):
        (first, second) = Greedy(model, stops=(), max_new_tokens=4)(prompt)
    tokens = torch.tensor([first, second])
    logits, _ = answered(model, KeyNorm(0.3), prompt, tokens)
    assert logits[:, :-1].argmax(dim=-1).tolist() == tokens[:, 1:].tolist()


def test_a_decoder_serves_the_answer_in_memory_for_what_stays(model, ids):
    prompt, answer = ids(2, PROMPT), ids(2, ANSWER)
    expected, _ = answered(model, KeyNorm(0.4), prompt, answer)
    with using(model, LRSAConfig(system=KeyNorm(0.4))), torch.no_grad():
        cache = LRSACache.of(model)
        prefill(model, prompt, cache)
        cache.end_prompt()
        decoder = Decoder(model, cache, room=ANSWER, longest=30)
        logits = [decoder.step(token).clone() for token in answer.split(1, dim=1)]
    torch.testing.assert_close(torch.cat(logits, dim=1), expected, rtol=0, atol=1e-6)
    assert cache.layers[0].streams[0].buffer.capacity == 12 + ANSWER


def test_a_system_is_kept_by_configs_and_changes_no_older_digest():
    config = LRSAConfig(system=StreamingLLM(0.25, sink_size=8))
    assert LRSAConfig.from_dict(config.to_dict()) == config
    assert "system" not in LRSAConfig().to_dict()
    assert config.digest() != LRSAConfig().digest()


@pytest.mark.parametrize(
    ("arguments", "field"),
    [({"kept": 0}, "kept"), ({"kept": 1.5}, "kept"), ({"kept": True}, "kept"), ({"pairs": 0}, "pairs")],
)
def test_shares_beyond_a_prompt_are_refused(arguments, field):
    with refused(field):
        KeyNorm(**arguments)


@pytest.mark.parametrize("sinks", [-1, 2.0, True])
def test_sinks_are_counted(sinks):
    with refused("sink_size"):
        StreamingLLM(sink_size=sinks)


def test_an_unknown_system_is_refused():
    with refused("system"):
        LRSAConfig(system={"class_path": "lrsa_lit.systems.Nothing"})


@pytest.mark.parametrize(("tokens", "removed", "kept"), vectors("streaming_llm")["n_kept"])
def test_a_share_keeps_as_many_as_kvpress(tokens, removed, kept):
    """But for a product that is a whole number: there 300 * (1 - 0.9) is 29.99…, and one is lost."""
    wanted = round(tokens * (1 - removed), 9)
    assert KeyNorm(1 - removed).count(tokens) == (wanted if wanted == int(wanted) else kept)


def test_no_budget_is_below_what_the_scorer_always_keeps():
    scorer = ExpectedAttention(sink_size=9)
    assert AdaKV(scorer=scorer).floor(40) == ChunkKVPress(scorer=scorer, size=3).floor(40) == 9
    assert AdaKV(scorer=SnapKV(window=5)).floor(40) == 5


@pytest.mark.parametrize("tokens", [5, 9, 10, 11, 13, 14, 23])
def test_sinks_and_tail_are_what_lagkv_press_always_keeps(tokens):
    """A budget never cuts into what has the highest score."""
    system = LagKVPress(sink_size=2, lag_size=4)
    key, value = torch.randn(2, 1, 3, tokens, 6, generator=torch.Generator().manual_seed(tokens)).unbind()
    scores = system.scores(Prompt(key, value, key[:, :, None, :0], 1.0, (0,)))
    assert ((scores == 1).sum(dim=-1) == min(system.floor(tokens), tokens)).all()
    floor, head = system.floor(tokens), Head(1, 1, 4)
    assert system.at_most(floor * head.pair, tokens, head).pairs == floor
    # A prompt that has no more holds all.
    assert tokens <= floor or system.at_most(floor * head.pair - 1, tokens, head) is None


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_a_copy_of_the_model_ends_prompts_as_well_and_the_plain_model_none(copied, ids):
    # Not the model of other tests, on which transformers may have left hooks that nothing can pickle.
    model, prompt = tiny_model().eval(), ids(2, PROMPT)
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}

    def generated(model):
        cache = LRSACache.of(model)
        return model.generate(prompt, **cache_argument(model, cache), **options), cache.prompt_ended

    with using(model, LRSAConfig(system=KeyNorm(0.3))):
        expected, ended = generated(model)
        other, ended_too = generated(copied(model))
        assert (ended, ended_too) == (True, True)
        assert torch.equal(other, expected)
    assert "prepare_inputs_for_generation" not in vars(model)
