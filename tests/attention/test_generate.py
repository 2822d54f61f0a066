"""``generate`` with the compressed cache, against greedy search without any cache."""

import pytest
import torch
from helpers import refused

from lrsa_lit.attention import LRSACache, enable
from lrsa_lit.ops.sparse_attention import stored_size

NEW = 24
GREEDY = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}


@pytest.fixture(scope="module")
def model(tiny, rule):
    return enable(tiny("Llama"), rule)


@torch.no_grad()
def greedy(model, ids, count=NEW):
    """Greedy search by parallel passes alone; the end token is never taken, as with ``min_new_tokens``."""
    for _ in range(count):
        logits = model(ids, use_cache=False).logits[:, -1]
        logits[:, model.config.eos_token_id] = -torch.inf
        ids = torch.cat([ids, logits.argmax(dim=-1, keepdim=True)], dim=1)
    return ids


def left_padded(tokens, lengths):
    ids, mask = torch.zeros(len(lengths), max(lengths), dtype=torch.long), torch.zeros(len(lengths), max(lengths))
    for row, length in enumerate(lengths):
        ids[row, -length:] = tokens(1, length, seed=length)
        mask[row, -length:] = 1
    return {"input_ids": ids, "attention_mask": mask.long()}


@pytest.mark.parametrize("length", [5, 17, 40], ids=lambda n: f"prompt{n}")
def test_greedy_search_is_the_parallel_pass_token_by_token(length, model, tokens, rule):
    ids = tokens(2, length)
    expected = greedy(model, ids)
    cache = LRSACache(rule, 3)
    assert model.generate(ids, past_key_values=cache, **GREEDY).equal(expected)
    assert cache.get_seq_length() == length + NEW - 1
    assert cache.stored_tokens() == [2 * stored_size(length + NEW - 1, rule.rule)] * 3


def test_the_rule_changes_what_is_generated(model, tiny, tokens):
    ids = tokens(2, 40)
    assert not greedy(model, ids).equal(greedy(tiny("Llama"), ids))


@pytest.mark.parametrize("use_cache", [True, False], ids=["dynamic-cache", "no-cache"])
def test_without_a_compressed_cache_the_same_rule_holds(use_cache, model, tokens):
    ids = tokens(2, 40)
    assert model.generate(ids, use_cache=use_cache, **GREEDY).equal(greedy(model, ids))


@pytest.mark.parametrize("kind", ["compressed", "dynamic"])
def test_unequal_left_padded_rows_generate_what_each_does_alone(kind, model, tokens, rule):
    lengths = [40, 3, 21, 33]
    given = {"past_key_values": LRSACache(rule, 3)} if kind == "compressed" else {}
    together = model.generate(**left_padded(tokens, lengths), **given, **GREEDY)
    for row, length in enumerate(lengths):
        assert together[row, None, 40 - length :].equal(greedy(model, tokens(1, length, seed=length)))
    if kind == "compressed":
        stored = sum(stored_size(length + NEW - 1, rule.rule) for length in lengths)
        assert given["past_key_values"].stored_tokens() == [stored] * 3


@pytest.mark.parametrize("padding", [False, True], ids=["equal", "unequal"])
def test_beam_search_is_that_of_an_uncompressed_cache(padding, model, tokens, rule):
    prompts = left_padded(tokens, [40, 29] if padding else [40, 40])
    options = {"num_beams": 3, "num_return_sequences": 2, **GREEDY}
    ours = model.generate(**prompts, past_key_values=LRSACache(rule, 3), **options)
    assert ours.shape == (4, 40 + NEW)
    assert ours.equal(model.generate(**prompts, **options))
    assert ours.equal(model.generate(**prompts, use_cache=False, **options))
    assert not ours[::2].equal(model.generate(**prompts, **GREEDY)), "beams that never cross prove nothing"


@pytest.mark.parametrize("padding", [False, True], ids=["equal", "unequal"])
def test_sampling_several_sequences_is_that_of_an_uncompressed_cache(padding, model, tokens, rule):
    prompts = left_padded(tokens, [30, 9] if padding else [30, 30])
    options = GREEDY | {"do_sample": True, "num_return_sequences": 3, "top_k": 0}

    def sample(**given):
        torch.manual_seed(0)
        return model.generate(**prompts, **given, **options)

    ours = sample(past_key_values=LRSACache(rule, 3))
    assert ours.shape == (6, 30 + NEW)
    assert ours.equal(sample())
    assert len({tuple(row) for row in ours.tolist()}) == 6


def test_chunked_prefill_changes_nothing(model, tokens, rule):
    ids = tokens(2, 40)
    ours = model.generate(ids, past_key_values=LRSACache(rule, 3), prefill_chunk_size=7, **GREEDY)
    assert ours.equal(greedy(model, ids))


@pytest.mark.parametrize("lengths", [[30], [30, 11]], ids=["one-row", "padded-rows"])
def test_a_second_turn_continues_on_the_same_cache(lengths, model, tokens, rule):
    cache, prompts = LRSACache(rule, 3), left_padded(tokens, lengths)
    first = model.generate(**prompts, past_key_values=cache, **GREEDY)
    assert cache.get_seq_length() == 30 + NEW - 1
    turn = torch.cat([first, tokens(len(lengths), 12, seed=1)], dim=1)
    mask = torch.ones_like(turn)
    mask[:, :30] = prompts["attention_mask"]
    second = model.generate(turn, attention_mask=mask, past_key_values=cache, **GREEDY)
    for row, length in enumerate(lengths):
        assert second[row, None, 30 - length :].equal(greedy(model, turn[row, None, 30 - length :]))
    stored = sum(stored_size(second.shape[1] - 1 - 30 + length, rule.rule) for length in lengths)
    assert cache.stored_tokens() == [stored] * 3


def test_dense_layers_generate_too(tiny, tokens, rule):
    config = rule.replace(dense_layers=(0, 2))
    model, ids = enable(tiny("Llama"), config), tokens(2, 40)
    cache = LRSACache(config, 3)
    assert model.generate(ids, past_key_values=cache, **GREEDY).equal(greedy(model, ids))
    everything = 2 * (40 + NEW - 1)
    assert cache.stored_tokens() == [everything, 2 * stored_size(40 + NEW - 1, rule.rule), everything]


@pytest.mark.parametrize("helper", ["prompt_lookup_num_tokens", "assistant_model"])
def test_assisted_decoding_is_refused(helper, model, tiny, tokens, rule):
    given = {helper: 3 if helper == "prompt_lookup_num_tokens" else tiny("Llama", seed=1)}
    # Since transformers 5.24 it asks the cache beforehand, and refuses in its own words.
    with pytest.raises(ValueError, match="cropped"):
        model.generate(tokens(1, 40), past_key_values=LRSACache(rule, 3), **given, **GREEDY)


def test_a_static_cache_is_refused(model, tokens):
    with refused("past_key_values", reason="static"):
        model.generate(tokens(1, 20), cache_implementation="static", **GREEDY)


def test_a_plain_model_is_refused(tiny, tokens, rule):
    with refused("cache", reason="needs a model with LRSA"):
        tiny("Llama").generate(tokens(1, 20), past_key_values=LRSACache(rule, 3), **GREEDY)
