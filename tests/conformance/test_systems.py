"""A system holds of each row what it holds of it alone, however the prompt and the answer come in."""

import copy
import dataclasses
import json

import pytest
import torch
from helpers import refused
from transformers import DynamicCache, StaticCache

from lrsa_lit.attention import (
    Greedy,
    LRSACache,
    LRSAConfig,
    cache_argument,
    enabled_config,
    end_prompt,
    prefill,
    read_prompts,
    using,
)
from lrsa_lit.data.collate import IGNORE_INDEX
from lrsa_lit.models import Backbone, LoRA
from lrsa_lit.models.tiny import tiny_model, tiny_tokenizer
from lrsa_lit.ops.sparse_attention.buffer import RowBuffer
from lrsa_lit.systems import System
from lrsa_lit.tasks.losses_behind_prompts import losses_behind_prompts

PROMPT, ANSWER = 23, 4
TOKENIZER = tiny_tokenizer()
LENGTHS = [23, 12, 19]


@pytest.fixture(scope="module")
def plain():
    """In float64, but for what transformers computes in float32."""
    return tiny_model(hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2).double().eval()


@pytest.fixture
def model(plain, system):
    with using(plain, LRSAConfig(system=system)), torch.no_grad():
        yield plain


def tokens(rows, length, seed=0):
    return torch.randint(3, 259, (rows, length), generator=torch.Generator().manual_seed(seed))


def behind(model, prompt, *, mask=None, calls=8192, to_come=None):
    """The cache where the prompt has ended, and the logits (B, 1, V) of its last tokens."""
    cache = LRSACache.of(model)
    logits = prefill(model, prompt, cache, attention_mask=mask, tokens_per_call=calls)
    end_prompt(model, cache, prompt, mask, encode=TOKENIZER.encode, to_come=to_come)
    return cache, logits


def answered(model, cache, answer, *, calls=8192):
    """Logits (B, A, V)."""
    calls = 1 if cache.config.system.answers_by_token else calls
    parts = [model(part, **cache_argument(model, cache)).logits for part in answer.split(calls, dim=1)]
    return torch.cat(parts, dim=1)


def alike(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("calls", [1, 5])
def test_prompts_and_answers_come_in_by_any_calls(model, calls):
    prompt, answer = tokens(2, PROMPT), tokens(2, ANSWER, seed=1)
    whole, last = behind(model, prompt)
    split, last_of_split = behind(model, prompt, calls=calls)
    alike(last_of_split, last)
    alike(answered(model, split, answer, calls=calls), answered(model, whole, answer))
    assert split.nbytes == whole.nbytes


def test_padded_rows_get_what_each_gets_alone(model):
    starts = [PROMPT - length for length in LENGTHS]
    mask = (torch.arange(PROMPT) >= torch.tensor(starts)[:, None]).long()
    prompt, answer = tokens(3, PROMPT) * mask, tokens(3, ANSWER, seed=1)
    together, last = behind(model, prompt, mask=mask)
    logits = answered(model, together, answer)
    for row, start in enumerate(starts):
        one = slice(row, row + 1)
        alone, last_alone = behind(model, prompt[one, start:])
        alike(last[one], last_alone)
        alike(logits[one], answered(model, alone, answer[one]))


def test_later_turns_find_what_the_first_one_left(model):
    """Whatever is asked later, the cut is that of the first turn; rows of one turn are among conversations."""
    firsts, lengths = [17, 12, 19], [23, 12, 21]
    rows = [tokens(1, length, seed=row) for row, length in enumerate(lengths)]
    mask = (torch.arange(PROMPT) >= PROMPT - torch.tensor(lengths)[:, None]).long()
    prompt = torch.cat([torch.nn.functional.pad(row, (PROMPT - row.shape[1], 0)) for row in rows])
    cache = LRSACache.of(model)
    last, seen = read_prompts(model, cache, prompt, mask, first_turns=firsts, encode=TOKENIZER.encode)
    assert seen.sum(dim=1).tolist() == lengths
    answer = tokens(3, ANSWER, seed=9)
    logits = answered(model, cache, answer)
    for place, (row, first) in enumerate(zip(rows, firsts, strict=True)):
        one = slice(place, place + 1)
        alone, last_alone = behind(model, row[:, :first])
        if first < row.shape[1]:
            last_alone = answered(model, alone, row[:, first:])[:, -1:]
        alike(last[one], last_alone)
        alike(logits[one], answered(model, alone, answer[one]))


def test_prompts_end_with_their_contexts_where_a_system_does_not_see_the_question(model, system):
    """Rows of conversations, of unequal contexts and questions, get what each gets alone, in any calls."""
    contexts, firsts, lengths = [14, 9, 14], [17, 12, 19], [23, 12, 21]
    rows = [tokens(1, length, seed=row) for row, length in enumerate(lengths)]
    mask = (torch.arange(PROMPT) >= PROMPT - torch.tensor(lengths)[:, None]).long()
    prompt = torch.cat([torch.nn.functional.pad(row, (PROMPT - row.shape[1], 0)) for row in rows])
    cache, ends = LRSACache.of(model), {"contexts": contexts, "first_turns": firsts}
    last, _ = read_prompts(model, cache, prompt, mask, **ends, encode=TOKENIZER.encode)
    answer = tokens(3, ANSWER, seed=9)
    logits = answered(model, cache, answer)
    for place, (row, context, first) in enumerate(zip(rows, contexts, firsts, strict=True)):
        one, end = slice(place, place + 1), first if system.question else context
        alone, last_alone = behind(model, row[:, :end], calls=5, to_come=[first - end])
        assert alone.nbytes == memory(alone)
        if end < first:
            last_alone = model(row[:, end:first], **cache_argument(model, alone)).logits[:, -1:]
        if first < row.shape[1]:
            last_alone = answered(model, alone, row[:, first:])[:, -1:]
        alike(last[one], last_alone)
        alike(logits[one], answered(model, alone, answer[one]))


def test_rows_of_a_batch_get_what_each_gets_alone(model):
    prompt, answer = tokens(3, PROMPT), tokens(3, ANSWER, seed=1)
    logits = answered(model, behind(model, prompt)[0], answer)
    for row in range(3):
        one = slice(row, row + 1)
        alike(logits[one], answered(model, behind(model, prompt[one])[0], answer[one]))


@pytest.mark.parametrize("ended", [False, True], ids=["in the prompt", "in the answer"])
def test_reordered_rows_go_on_as_they_were(model, ended):
    prompt, answer, order = tokens(2, PROMPT), tokens(2, ANSWER, seed=1), torch.tensor([1, 0, 1])
    expected = answered(model, behind(model, prompt)[0], answer)[order]
    cache = LRSACache.of(model)
    if ended:
        prefill(model, prompt, cache)
        end_prompt(model, cache, prompt, encode=TOKENIZER.encode)
        answered(model, cache, answer[:, :2])
        cache.reorder_cache(order)
        alike(answered(model, cache, answer[order, 2:]), expected[:, 2:])
        return
    if cache.config.system.needs_whole_prompt:
        pytest.skip("it takes no prompt in pieces")
    prefill(model, prompt[:, :17], cache)
    cache.reorder_cache(order)
    prefill(model, prompt[order, 17:], cache)
    end_prompt(model, cache, prompt[order], encode=TOKENIZER.encode)
    alike(answered(model, cache, answer[order]), expected)


def test_a_copy_goes_on_like_the_original(model):
    prompt, answer = tokens(2, PROMPT), tokens(2, ANSWER, seed=1)
    cache, _ = behind(model, prompt)
    copied = copy.deepcopy(cache)
    alike(answered(model, cache, answer), answered(model, copied, answer))


def test_dense_layers_hold_all_and_do_as_in_a_dense_model(model):
    prompt, answer = tokens(2, PROMPT), tokens(2, ANSWER, seed=1)
    config = enabled_config(model)
    with using(model, config.replace(dense_layers=(1,))):
        cache, _ = behind(model, prompt)
        answered(model, cache, answer)
        assert cache.stored_tokens()[1] == 2 * (PROMPT + ANSWER)
    with using(model, config.replace(dense_layers=(0, 1))):
        dense = answered(model, behind(model, prompt)[0], answer)
    with using(model, None):
        alike(dense, model(torch.cat([prompt, answer], dim=1)).logits[:, PROMPT:])


def test_losses_and_answers_are_those_of_the_cache(model):
    """Of padded prompts and answers of unequal lengths."""
    mask = (torch.arange(PROMPT) >= PROMPT - torch.tensor(LENGTHS)[:, None]).long()
    prompt, answer = tokens(3, PROMPT) * mask, tokens(3, ANSWER, seed=1)
    sizes = [ANSWER, 1, 3]
    labels = torch.full((3, ANSWER + 2), IGNORE_INDEX)
    for row, size in enumerate(sizes):
        labels[row, row : row + size] = answer[row, :size]
    losses = losses_behind_prompts(model, {"prompt_ids": prompt, "prompt_mask": mask, "labels": labels}, TOKENIZER)
    cache, last = behind(model, prompt, mask=mask)
    logits = torch.cat([last, answered(model, cache, answer, calls=1)], dim=1).float().log_softmax(dim=-1)
    for row, size in enumerate(sizes):
        expected = -sum(logits[row, place, answer[row, place]] for place in range(size))
        torch.testing.assert_close(losses[row].float(), expected, rtol=0, atol=1e-3)
    likely, tokens_of = Greedy(model, stops=(), max_new_tokens=3, encode=TOKENIZER.encode)(prompt, mask), []
    cache, last = behind(model, prompt, mask=mask)
    for _ in range(3):
        tokens_of.append(last[:, -1].argmax(dim=-1))
        last = answered(model, cache, tokens_of[-1][:, None])
    assert likely == torch.stack(tokens_of, dim=1).tolist()


def beams(model, cache, rows, count=2, new=4):
    """Of each row, by whole prompts and answers token by token: the best of so many beams, without an end token."""
    best = []
    for row in rows:
        alive = [(0.0, [])]
        for _ in range(new):
            found = []
            for score, tokens in alive:
                own, logits = cache(model, row[None])
                for token in tokens:
                    logits = model(torch.tensor([[token]]), **cache_argument(model, own)).logits
                shares = logits[0, -1].float().log_softmax(dim=-1)
                shares[model.config.eos_token_id] = -torch.inf
                found += [
                    (score + float(shares[token]), [*tokens, token]) for token in shares.topk(count).indices.tolist()
                ]
            alive = sorted(found, reverse=True)[:count]
        best.append(alive[0][1])
    return best


def test_beams_of_generate_are_those_of_prompts_that_have_ended(model, system):
    """Also without anybody saying that they have; where the model must repeat them, somebody must."""
    prompt = tokens(2, PROMPT)
    options = {"num_beams": 2, "do_sample": False, "max_new_tokens": 4, "min_new_tokens": 4, "pad_token_id": 0}
    if system.repeats_prompt:
        with refused("system", reason="end_prompt"):
            model.generate(prompt, **cache_argument(model, LRSACache.of(model)), **options)
        cache, _ = behind(model, prompt)
        cache.batch_repeat_interleave(2)
        more = torch.cat([prompt, tokens(2, 1, seed=2)], dim=1)
        assert model.generate(more, **cache_argument(model, cache), **options).shape == (2, PROMPT + 5)
        return
    found = model.generate(prompt, **cache_argument(model, LRSACache.of(model)), **options)
    assert found[:, PROMPT:].tolist() == beams(model, behind, prompt)


def test_it_answers_from_no_other_cache(model, system):
    prompt = tokens(2, PROMPT)
    static = StaticCache(model.config, max_cache_len=PROMPT + ANSWER)
    with refused("past_key_values", reason="static caches are not allowed"):
        model(prompt, **cache_argument(model, static))
    dynamic = cache_argument(model, DynamicCache(config=model.config))
    if system.trains:
        whole = model(prompt, use_cache=False).logits
        alike(torch.cat([model(part, **dynamic).logits for part in prompt.split(9, dim=1)], dim=1), whole)
        return
    with refused("past_key_values", "DynamicCache", reason=f"{type(system).__name__} works only with an LRSACache"):
        model(prompt, **dynamic)


def test_packed_sequences_are_alone(model):
    """In a pass without a cache; no cache takes several sequences in one row."""
    parts = [tokens(1, length, seed=length) for length in LENGTHS]
    places = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    ids = torch.cat(parts, dim=1)
    packed = model(ids, position_ids=places, use_cache=False).logits
    alike(packed, torch.cat([model(part, use_cache=False).logits for part in parts], dim=1))
    with refused("position_ids", reason="packed sequences cannot be cached"):
        model(ids, position_ids=places, **cache_argument(model, LRSACache.of(model)))


def test_adapters_do_what_they_do_to_the_weights(system):
    """LoRA beside the weights, and merged into them."""
    model = Backbone("tiny", lora=LoRA(rank=2)).build().eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.1, generator=torch.Generator().manual_seed(len(name)))
    prompt, answer, logits = tokens(2, PROMPT), tokens(2, ANSWER, seed=1), []
    for merged in (False, True):
        model = model.merge_and_unload() if merged else model
        with using(model, LRSAConfig(system=system)), torch.no_grad():
            logits.append(answered(model, behind(model, prompt)[0], answer))
    torch.testing.assert_close(*logits, rtol=0, atol=1e-3)


def test_one_that_trains_has_a_parallel_pass(model, system):
    if not system.trains:
        pytest.skip("its losses come from the cache")
    ids = tokens(2, PROMPT)
    cache = LRSACache.of(model)
    alike(answered(model, cache, ids, calls=5), model(ids, use_cache=False).logits)


def test_its_bytes_are_those_of_the_memory_that_it_holds(model):
    cache = LRSACache.of(model)
    pieces = tokens(1, PROMPT).split(PROMPT if cache.config.system.needs_whole_prompt else 11, dim=1)
    for ids in pieces:
        prefill(model, ids, cache)
        assert cache.nbytes == memory(cache)
    end_prompt(model, cache, torch.cat(pieces, dim=1), encode=TOKENIZER.encode)
    assert cache.nbytes == memory(cache)
    answered(model, cache, tokens(1, ANSWER))
    assert cache.nbytes == memory(cache)


LOOKED_AT = {"kept", "patterns", "attended", "reads", "thresholds", "_unread"}
"""What is there to be looked at, or a number a row."""


def memory(cache):
    """Bytes of all tensors that the streams hold, but for spare rows of buffers."""
    seen, found, sizes = set(), [stream for layer in cache.layers for stream in layer.streams], {}
    while found:
        item = found.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, torch.Tensor):
            storage = item.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
        elif isinstance(item, RowBuffer):
            sizes[item.address] = item.nbytes
        elif isinstance(item, list | tuple):
            found += item
        elif isinstance(item, dict):
            found += item.values()
        elif type(item).__module__.startswith("lrsa_lit") and hasattr(item, "__dict__"):
            found += [value for name, value in vars(item).items() if name not in LOOKED_AT]
    return sum(sizes.values())


def test_pairs_are_counted(system):
    assert 0 < system.attended_pairs(50) <= 50 * 51 // 2


def test_arguments_of_another_type_are_refused_by_their_keys(system):
    """Also where no parser knows the class: a text would be true."""
    written = System.to_dict(system)
    for item in dataclasses.fields(system):
        if item.type in ("bool", "int", "float", "str", "int | None", "float | None"):
            for wrong in ([], "no" if item.type != "str" else 1):
                values = {**written, "init_args": written["init_args"] | {item.name: wrong}}
                with refused(f"system.init_args.{item.name}", wrong):
                    System.from_dict(values)


def test_it_survives_being_written_as_json(system):
    config = LRSAConfig(system=system)
    stored = json.loads(json.dumps(config.to_dict()))
    assert LRSAConfig.from_dict(stored) == config
    assert LRSAConfig.from_dict(stored).digest() == config.digest()
    assert hash(System.from_dict(system.to_dict())) == hash(system)
