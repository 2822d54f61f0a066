"""Cascading KV cache against recorded states and outputs: policies, strides, calls, what it holds."""

import json

import pytest
import torch
from helpers import VECTORS, random_qkv, refused

from lrsa_lit.attention import LRSACache, LRSAConfig, cache_argument, prefill, using
from lrsa_lit.ops.sparse_attention import Rotary
from lrsa_lit.systems import Cascade, Place
from lrsa_lit.systems.cascade import keep
from lrsa_lit.systems.received_attention import attention_and_sums

RECORDED = json.loads((VECTORS / "systems/cascade.json").read_text())
EXPECTED, INPUTS, PARAMS = (RECORDED[name] for name in ("expected", "inputs", "params"))
SMALL = Cascade(window=3, caches=3, sink_size=2, stride=5, beta=0.9)
SCALE = 0.4


def sized(name, **others):
    sizes = PARAMS[name]
    return Cascade(sizes["W"], sizes["C"], sizes["S"], **others)


def states(system, scores, tokens):
    """The tokens that each head holds after each arrival of so many of them."""
    held, score = (torch.empty(1, len(scores), 0, dtype=dtype) for dtype in (torch.int64, torch.float64))
    counts, found, length = system.empty, [], len(scores[0])
    given = torch.tensor([scores], dtype=torch.float64)
    for seen in range(0, length, tokens):
        new = torch.arange(seen, min(seen + tokens, length)).expand(1, len(scores), -1)
        held, score = torch.cat([held, new], dim=2), torch.cat([score, given.gather(2, new)], dim=2)
        kept, counts = keep(system, counts, seen, score)
        held, score = held.gather(2, kept), score.gather(2, kept)
        found.append(held[0].tolist())
    return found


@pytest.mark.parametrize("policy", ["a", "b"])
@pytest.mark.parametrize("eager", [True, False])
def test_recorded_states(policy, eager):
    system, scores = sized(f"policy_{policy}", eager=eager), INPUTS["policy_scores"]
    wanted = EXPECTED[f"policy_{policy}_{'eager' if eager else 'not_eager'}"]
    assert states(system, scores, 1) == wanted
    # Scores that do not change: tokens that arrive together are tokens that arrive one by one.
    assert states(system, scores, 5) == [*wanted[4::5], wanted[-1]]


@pytest.mark.parametrize("eager", [True, False])
def test_few_plans_serve_all_tokens(eager):
    """What is accepted next is the same in each phase, so that nothing is planned anew for each token of an answer."""
    system = Cascade(window=3, caches=4, sink_size=2, eager=eager)
    for seen in range(60):
        phase = system.phase(seen)
        accepted = [
            [system.accepts(cache, start + n) for start in (seen, phase)] for cache in range(4) for n in range(9)
        ]
        assert all(now == then for now, then in accepted)
    assert len({system.phase(seen) for seen in range(system.capacity + 1, 1000)}) == 8


@pytest.mark.parametrize("tokens", [1, 2, 20])
def test_a_long_recorded_state(tokens):
    found = states(sized("policy_c"), INPUTS["policy_scores_40"], tokens)
    assert found[-1] == EXPECTED["policy_c_after_token_39"]
    if tokens == 1:
        assert found[20] == EXPECTED["policy_c_after_token_20"]


def test_of_equal_scores_the_later_token_stays():
    assert (
        states(sized("policy_c", eager=False), [[1.0] * 40], 40)
        == states(sized("policy_c", eager=False), [[0.0] * 40], 1)[-1:]
    )


def recorded_case(**others):
    """Rotated queries (1, Hq, T, D), keys and values (1, H, T, D), the system and the place."""
    rotary = Rotary.plain(4)
    query, key, value = (torch.tensor([INPUTS[name]], dtype=torch.float64) for name in "qkv")
    query, key = (rotary.rotate(x, range(key.shape[2])) for x in (query.flatten(1, 2), key))
    return (query, key, value), sized("attention", beta=PARAMS["beta"], **others), Place(0, rotary)


def streamed(system, qkv, calls, where, scale=SCALE):
    stream = system.stream(where, "auto")
    outputs = [stream.attend(*part, scale) for part in zip(*(x.split(calls, dim=2) for x in qkv), strict=True)]
    return torch.cat(outputs, dim=2), stream


def kept_tokens(stream, value):
    """Which tokens (H, n) are held, by their values, which nothing changes."""
    return (stream.stored[1][0, :, :, None] == value[0, :, None]).all(dim=-1).int().argmax(dim=-1).tolist()


@pytest.mark.parametrize("stride", [1, 4])
@pytest.mark.parametrize("calls", [1, 3, 16])
def test_recorded_outputs(stride, calls):
    qkv, system, where = recorded_case(stride=stride)
    wanted = EXPECTED[f"attention_stride_{stride}"]
    found, stream = streamed(system, qkv, calls, where, 0.5)
    out = torch.tensor([wanted["out"]], dtype=torch.float64).flatten(1, 2)
    torch.testing.assert_close(found, out, rtol=0, atol=1e-6)
    assert kept_tokens(stream, qkv[2]) == wanted["kept_after_each_chunk"][-1]


def test_recorded_means_over_query_heads():
    qkv, system, where = recorded_case(stride=1, reduce="mean")
    _, stream = streamed(system, qkv, 16, where, 0.5)
    assert kept_tokens(stream, qkv[2]) == EXPECTED["attention_stride_1_mean_kept_last"]


@pytest.mark.parametrize("calls", [1, 4, 5, 7])
def test_calls_are_no_strides_and_a_prompt_ends_with_its_remainder(calls):
    where = Place(0, Rotary.plain(6))
    prompt, answer = random_qkv(33, batch=2, dim=6), random_qkv(9, batch=2, dim=6, seed=1)
    whole, stream = streamed(SMALL, prompt, 33, where)
    found, split = streamed(SMALL, prompt, calls, where)
    torch.testing.assert_close(found, whole, rtol=0, atol=1e-12)
    assert (split.waiting, split.counts) == (3, (2, 3, 3, 3))
    for each in (stream, split):
        each.end_prompt()
        # Keys and values, and a score of each pair.
        assert (each.waiting, each.nbytes) == (0, 2 * 2 * 11 * (2 * 6 + 1) * 8)
    picked = torch.tensor([1, 1, 0])
    some = split.rows(picked)
    later = stream.attend(*answer, SCALE)
    for index, part in enumerate(zip(*(x.split(1, dim=2) for x in answer), strict=True)):
        one = split.attend(*part, SCALE)
        torch.testing.assert_close(one[:, :, 0], later[:, :, index], rtol=0, atol=1e-12)
    torch.testing.assert_close(some.attend(*(x[picked] for x in answer), SCALE), later[picked], rtol=0, atol=1e-12)


def test_pairs_and_counts_are_those_of_the_streams():
    for system in (SMALL, Cascade(3, 3, 2, 5, eager=False), Cascade(1, 4, 0, 1)):
        where, pairs = Place(0, Rotary.plain(6)), 0
        stream = system.stream(where, "auto")
        for part in zip(*(x.split(1, dim=2) for x in random_qkv(31, dim=6)), strict=True):
            pairs += sum(stream.counts) + stream.waiting + 1
            stream.attend(*part, SCALE)
        assert system.attended_pairs(31) == pairs
        assert system.attended_pairs(0) == 0


def test_sums_of_any_blocks_are_those_of_all_queries(monkeypatch):
    query, key, value = random_qkv(13, batch=2, queries=9)
    weights = torch.rand(9, dtype=torch.float64)
    whole = attention_and_sums(query.unflatten(1, (2, 2)), key, value, SCALE, weights)
    monkeypatch.setattr("lrsa_lit.systems.at_once._PROBABILITIES", 13 * 8 * 2)
    blocks = attention_and_sums(query.unflatten(1, (2, 2)), key, value, SCALE, weights)
    torch.testing.assert_close(blocks, whole, rtol=0, atol=1e-12)
    torch.testing.assert_close(whole[1].sum(dim=-1), weights.sum().expand(2, 2, 2), rtol=0, atol=1e-12)


def test_a_model_says_the_same_for_padded_rows_and_in_half_precision(model, ids):
    prompt, answer, pads = ids(2, 30), ids(2, 4), [0, 8]
    mask = (torch.arange(30) >= torch.tensor(pads)[:, None]).long()

    def said(prompt, answer, mask):
        cache = LRSACache.of(model)
        prefill(model, prompt * mask, cache, attention_mask=mask, tokens_per_call=7)
        cache.end_prompt()
        mask = torch.cat([mask, torch.ones_like(answer)], dim=1)
        return model(answer, attention_mask=mask, use_cache=True, **cache_argument(model, cache)).logits

    with using(model, LRSAConfig(system=SMALL, dense_layers=(1,))), torch.no_grad():
        together = said(prompt, answer, mask)
        alone = said(prompt[1:, 8:], answer[1:], mask[1:, 8:])
    torch.testing.assert_close(together[1:], alone, rtol=0, atol=1e-8)
    where = Place(0, Rotary.plain(6))
    exact, half = random_qkv(9, dim=6), [x.bfloat16() for x in random_qkv(9, dim=6)]
    wanted, found = (streamed(SMALL, qkv, 9, where)[0] for qkv in (exact, half))
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=0.05)


@pytest.mark.parametrize("pads", [(0, 8, 3, 16), (0, 4, 25, 29)], ids=["full", "filling"])
def test_rows_of_unequal_lengths_answer_together_as_each_does_alone(pads, model, ids):
    """Some are in the same phase and attend as one, some hold fewer pairs; each counts what it attended to."""
    prompt, answer = ids(4, 30), ids(4, 9)
    mask = (torch.arange(30) >= torch.tensor(pads)[:, None]).long()

    def said(rows, prompt, mask):
        cache, logits = LRSACache.of(model), []
        prefill(model, prompt * mask, cache, attention_mask=mask)
        cache.end_prompt()
        for at in range(9):
            logits.append(prefill(model, answer[rows, at, None], cache))
        return torch.cat(logits, dim=1), cache.measured(len(mask))

    with using(model, LRSAConfig(system=SMALL, dense_layers=(1,))), torch.no_grad():
        together, measured = said(slice(None), prompt, mask)
        for row, begin in enumerate(pads):
            own = slice(row, row + 1)
            alone, (cost,) = said(own, prompt[own, begin:], mask[own, begin:])
            torch.testing.assert_close(together[own], alone, rtol=0, atol=1e-8)
            assert measured[row] == cost


@pytest.mark.parametrize(
    ("arguments", "field"),
    [({"window": 0}, "window"), ({"caches": 0}, "caches"), ({"sink_size": -1}, "sink_size"), ({"stride": 0}, "stride"),
     ({"beta": 1.5}, "beta"), ({"reduce": "sum"}, "reduce")],
)  # fmt: skip
def test_sizes_of_nothing_are_refused(arguments, field):
    with refused(field):
        Cascade(**arguments)
