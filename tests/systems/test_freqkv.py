"""FreqKV against recorded outputs and a loop over its definition: rounds, slots, gradients, what it holds."""

import json
import math

import pytest
import torch
from helpers import VECTORS, boundaries, random_qkv, refused

from lrsa_lit.attention import LRSACache, LRSAConfig, cache_argument, prefill, using
from lrsa_lit.ops.sparse_attention import Rotary
from lrsa_lit.systems import FreqKV, Place
from lrsa_lit.systems.freqkv import transform

RECORDED = json.loads((VECTORS / "systems/freqkv.json").read_text())
SYSTEM = FreqKV(capacity=11, sink_size=3, gamma=0.4)
SCALE = 0.4


def place(dim=6):
    return Place(0, Rotary.plain(dim))


def low(slots, kept):
    """W from its closed form."""
    m = torch.arange(1, max(kept, 1), dtype=torch.float64)
    cosines = [torch.cos(math.pi / (2 * n) * torch.outer(2 * torch.arange(n) + 1, m)) for n in (max(kept, 1), slots)]
    return (1 + 2 * cosines[0] @ cosines[1].T)[:kept] / slots


def loop(query, key, value, system, scale, rotary, wrong=""):
    """One token after the other over a cache of keys (B, Hq, n, D) that are turned anew for each; all not rotated."""
    group = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(group, dim=1) for x in (key, value))
    sinks, capacity = system.sink_size, system.capacity
    kept = int(system.gamma * (capacity - sinks))
    weights = low(capacity - sinks, kept) * (((capacity - sinks) / kept) ** 0.5 if wrong == "scale" else 1)
    held, outputs, step = [key[:, :, :0], value[:, :, :0]], [], capacity - sinks - kept
    for t in range(query.shape[2]):
        if t >= capacity and (t - capacity) % step == 0:
            for index in range(2):
                middle = held[index][:, :, sinks:]
                if wrong == "once":
                    middle = (key, value)[index][:, :, sinks:t]
                    weights = low(t - sinks, kept)
                held[index] = torch.cat([held[index][:, :, :sinks], weights @ middle], dim=2)
        held = [torch.cat([past, x[:, :, t : t + 1]], dim=2) for past, x in zip(held, (key, value), strict=True)]
        count = held[0].shape[2]
        one = rotary.rotate(query[:, :, t : t + 1], [t if wrong == "absolute" else count - 1])
        scores = one @ rotary.rotate(held[0], range(count)).transpose(2, 3) * scale
        outputs.append(scores.softmax(dim=-1) @ held[1])
    return torch.cat(outputs, dim=2)


def handed_over(query, key, value, rotary, lengths=()):
    """As a model hands it over: queries and keys turned by their positions."""
    positions = torch.cat([torch.arange(n) for n in lengths or [key.shape[2]]])
    return rotary.rotate(query, positions), rotary.rotate(key, positions), value


def streamed(system, qkv, calls, where, scale=SCALE):
    stream = system.stream(where, "auto")
    outputs = [stream.attend(*part, scale) for part in zip(*(x.split(calls, dim=2) for x in qkv), strict=True)]
    return torch.cat(outputs, dim=2), stream


def recorded_case():
    """Queries, keys and values (1, H, T, D), not rotated, and the system."""
    params = RECORDED["params"]
    qkv = [torch.tensor([RECORDED["inputs"][name]], dtype=torch.float64) for name in "qkv"]
    return qkv, FreqKV(params["N"], params["S"], params["gamma"])


def test_recorded_outputs():
    (query, key, value), system = recorded_case()
    wanted = torch.tensor([RECORDED["expected"]["out"]], dtype=torch.float64)
    weights = torch.tensor(RECORDED["expected"]["W"], dtype=torch.float64)
    torch.testing.assert_close(transform(6, 3, key.device, key.dtype), weights, rtol=0, atol=1e-7)
    qkv = handed_over(query, key, value, Rotary.plain(4))
    whole = system.attend(*qkv, cu_seqlens=None, scale=0.5, place=place(4))
    torch.testing.assert_close(whole, wanted, rtol=0, atol=1e-6)
    for calls in (1, 3, 16):
        torch.testing.assert_close(streamed(system, qkv, calls, place(4), 0.5)[0], wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("wrong", "first"),
    [("", -0.7265), ("scale", -0.7686), ("absolute", -1.5574), ("rotated", -1.0200), ("once", -0.7356)],
)
def test_the_loop_tells_recorded_mistakes_apart(wrong, first):
    qkv, system = recorded_case()
    rotary = Rotary.plain(4)
    if wrong == "rotated":
        # Compressed as they are, and left where they are.
        qkv, rotary = handed_over(*qkv, rotary), Rotary(())
    assert loop(*qkv, system, 0.5, rotary, wrong)[0, 1, 15, 0].item() == pytest.approx(first, abs=1e-4)


@pytest.mark.parametrize("system", [SYSTEM, FreqKV(8, 0, 0.5), FreqKV(9, 2, 0), FreqKV(5, 4, 0.9)], ids=str)
@pytest.mark.parametrize("length", [5, 11, 12, 37])
def test_the_parallel_pass_is_the_loop_with_its_gradients(system, length):
    qkv = random_qkv(length, batch=2, dim=6, grad=True)
    where = place()
    wanted = loop(*qkv, system, SCALE, where.rotary)
    found = system.attend(*handed_over(*qkv, where.rotary), cu_seqlens=None, scale=SCALE, place=where)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-10)
    weights = torch.randn(wanted.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    gradients = [torch.autograd.grad((output * weights).sum(), qkv) for output in (found, wanted)]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)


def test_packed_sequences_are_alone_and_the_last_queries_may_come_by_themselves():
    lengths, where = [23, 4, 12, 30], place()
    qkv = random_qkv(sum(lengths), dim=6)
    parts = list(zip(*(x.split(lengths, dim=2) for x in qkv), strict=True))
    wanted = torch.cat([loop(*part, SYSTEM, SCALE, where.rotary) for part in parts], dim=2)
    packed = handed_over(*qkv, where.rotary, lengths)
    found = SYSTEM.attend(*packed, cu_seqlens=boundaries(lengths), scale=SCALE, place=where)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-10)
    query, key, value = handed_over(*parts[-1], where.rotary)
    last = SYSTEM.attend(query[:, :, -7:], key, value, cu_seqlens=None, scale=SCALE, place=where)
    torch.testing.assert_close(last, wanted[:, :, -7:], rtol=0, atol=1e-10)


@pytest.mark.parametrize("calls", [1, 4, 11, 40])
def test_any_split_is_the_parallel_pass_and_what_is_held_never_exceeds_the_capacity(calls):
    where = place()
    qkv = handed_over(*random_qkv(40, batch=3, dim=6), where.rotary)
    whole = SYSTEM.attend(*qkv, cu_seqlens=None, scale=SCALE, place=where)
    found, stream = streamed(SYSTEM, qkv, calls, where)
    torch.testing.assert_close(found, whole, rtol=0, atol=1e-10)
    assert stream.stored[0].shape[2] == SYSTEM.slot(39) + 1
    with torch.no_grad():
        _, stream = streamed(SYSTEM, qkv, calls, where)
    assert stream.nbytes == 2 * 3 * 2 * (SYSTEM.slot(39) + 1) * 6 * 8
    assert stream.stored[0].untyped_storage().nbytes() == 3 * 2 * 11 * 6 * 8
    (query, key, value), picked = random_qkv(9, batch=2, dim=6, seed=1), torch.tensor([2, 0])
    some, more = stream.rows(picked), [x.repeat(2, 1, 1, 1)[:3] for x in (query, key, value)]
    wanted = stream.attend(*more, SCALE)[picked]
    torch.testing.assert_close(some.attend(*(x[picked] for x in more), SCALE), wanted)


def test_pairs_are_those_that_the_loop_sees():
    for system in (SYSTEM, FreqKV(8, 0, 0.5), FreqKV(9, 2, 0)):
        for length in (0, 8, 9, 11, 12, 40):
            assert system.attended_pairs(length) == sum(system.slot(t) + 1 for t in range(length))


def test_a_model_says_the_same_with_and_without_a_cache_padded_too(model, ids):
    tokens, pads = ids(2, 34), [0, 9]
    mask = (torch.arange(34) >= torch.tensor(pads)[:, None]).long()
    with using(model, LRSAConfig(system=SYSTEM, dense_layers=(1,))), torch.no_grad():
        whole = model(tokens * mask, attention_mask=mask).logits
        cache = LRSACache.of(model)
        prefill(model, (tokens * mask)[:, :-1], cache, attention_mask=mask[:, :-1], tokens_per_call=8)
        cache.end_prompt()
        last = model(tokens[:, -1:], attention_mask=mask, use_cache=True, **cache_argument(model, cache)).logits
        alone = model(tokens[1:, 9:]).logits
    torch.testing.assert_close(last[:, 0], whole[:, -1], rtol=0, atol=1e-8)
    torch.testing.assert_close(alone[0], whole[1, 9:], rtol=0, atol=1e-8)


def test_half_precision_errs_by_its_rounding():
    where = place()
    exact = handed_over(*random_qkv(40, dim=6), where.rotary)
    half = [x.bfloat16() for x in exact]
    wanted = SYSTEM.attend(*exact, cu_seqlens=None, scale=SCALE, place=where)
    for found in (SYSTEM.attend(*half, cu_seqlens=None, scale=SCALE, place=where), streamed(SYSTEM, half, 7, where)[0]):
        assert found.dtype == torch.bfloat16
        torch.testing.assert_close(found.double(), wanted, rtol=0, atol=0.06)


@pytest.mark.parametrize(
    ("arguments", "field"),
    [({"capacity": 4}, "capacity"), ({"capacity": 8.0}, "capacity"), ({"sink_size": -1}, "sink_size"),
     ({"gamma": 1}, "gamma"), ({"gamma": -0.1}, "gamma")],
)  # fmt: skip
def test_capacities_without_room_are_refused(arguments, field):
    with refused(field):
        FreqKV(**arguments)
