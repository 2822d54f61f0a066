"""DuoAttention against recorded outputs and its definition as a mask: gates, both kinds of heads, what they hold."""

import json

import pytest
import torch
from helpers import VECTORS, boundaries, random_qkv, refused

from lrsa_lit.attention import LRSACache, LRSAConfig, cache_argument, prefill, using
from lrsa_lit.systems import DuoAttention, Place, gated_attention
from lrsa_lit.systems.streaming import StreamingHeads, streaming_attention

RECORDED = json.loads((VECTORS / "systems/duoattention.json").read_text())
GATES = [[0.9, 0.1], [0.2, 0.3], [0.8, 0.7]]
SYSTEM = DuoAttention(GATES, sink_size=3, recent=5)
SCALE = 0.4


def masked(query, key, value, sink, recent, scale=SCALE):
    """The definition, with one mask for all."""
    group, tokens = query.shape[1] // key.shape[1], key.shape[2]
    key, value = (x.repeat_interleave(group, dim=1) for x in (key, value))
    i, j = torch.arange(tokens - query.shape[2], tokens)[:, None], torch.arange(tokens)
    visible = (j <= i) & ((j < sink) | (i - j < recent))
    return (query @ key.mT * scale).masked_fill(~visible, float("-inf")).softmax(dim=-1) @ value


def by_head(query, key, value, full, system=SYSTEM):
    """The definition of a layer, some of whose heads are full."""
    group = query.shape[1] // key.shape[1]
    parts = zip(query.split(group, dim=1), key.split(1, dim=1), value.split(1, dim=1), full, strict=True)
    everything = key.shape[2]
    return torch.cat(
        [masked(*qkv, system.sink_size, everything if own else system.recent) for *qkv, own in parts], dim=1
    )


def test_recorded_outputs():
    query, key, value = (torch.tensor([RECORDED["inputs"][name]], dtype=torch.float64) for name in "qkv")
    sizes = {"sink": RECORDED["params"]["sink"], "recent": RECORDED["params"]["recent"]}
    gates = torch.tensor(RECORDED["params"]["alpha"], dtype=torch.float64)
    for name, given in (("mixed", gates), ("streaming", torch.zeros(2))):
        found = gated_attention(query, key, value, given, **sizes, scale=0.5)
        wanted = torch.tensor([RECORDED["expected"][name]], dtype=torch.float64)
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)
    system = DuoAttention([gates.tolist()], RECORDED["params"]["sparsity"])
    assert list(system.full[0]) == RECORDED["expected"]["full_heads"]


@pytest.mark.parametrize(("sink", "recent"), [(0, 1), (2, 4), (3, 7), (60, 3)])
@pytest.mark.parametrize("tokens", [1, 6, 7, 53])
def test_blocks_are_the_mask_with_its_gradients(sink, recent, tokens):
    for queries in {1, tokens // 2 or 1, tokens}:
        qkv = random_qkv(tokens, batch=2, queries=queries, grad=True)
        found, wanted = streaming_attention(*qkv, sink, recent, SCALE), masked(*qkv, sink, recent)
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)
        ours, theirs = (torch.autograd.grad(output.square().sum(), qkv) for output in (found, wanted))
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-10)


@pytest.mark.parametrize("calls", [1, 4, 9, 31])
def test_streaming_heads_hold_sinks_and_recent_pairs_alone(calls):
    qkv = random_qkv(31, batch=2)
    stream = StreamingHeads(3, 5)
    outputs = [stream.attend(*part, SCALE) for part in zip(*(x.split(calls, dim=2) for x in qkv), strict=True)]
    torch.testing.assert_close(torch.cat(outputs, dim=2), masked(*qkv, 3, 5), rtol=0, atol=1e-12)
    assert [part.untyped_storage().nbytes() for part in stream.stored] == [2 * 2 * 8 * 5 * 8] * 2
    picked = torch.tensor([1, 1, 0])
    more = random_qkv(2, batch=2, seed=1)
    some = stream.rows(picked).attend(*(x[picked] for x in more), SCALE)
    torch.testing.assert_close(some, stream.attend(*more, SCALE)[picked])


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_a_layer_is_its_heads(layer):
    lengths = [20, 3, 9]
    qkv = random_qkv(sum(lengths))
    wanted = torch.cat(
        [by_head(*part, SYSTEM.full[layer]) for part in zip(*(x.split(lengths, dim=2) for x in qkv), strict=True)],
        dim=2,
    )
    found = SYSTEM.attend(*qkv, cu_seqlens=boundaries(lengths), scale=SCALE, place=Place(layer))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)
    query, key, value = (x[:, :, :20] for x in qkv)
    last = SYSTEM.attend(query[:, :, -3:], key, value, cu_seqlens=None, scale=SCALE, place=Place(layer))
    torch.testing.assert_close(last, wanted[:, :, 17:20], rtol=0, atol=1e-12)


def test_gates_have_the_gradient_of_the_difference():
    query, key, value = random_qkv(12)
    gates = torch.tensor([0.3, 0.6], dtype=torch.float64, requires_grad=True)
    inputs = (gates,)
    assert torch.autograd.gradcheck(
        lambda gates: gated_attention(query, key, value, gates, sink=1, recent=3, scale=SCALE), inputs
    )


@pytest.mark.parametrize(
    ("sparsity", "full"), [(0, 6), (0.2, 5), (0.5, 3), (0.51, 3), (0.6, 3), (0.61, 2), (0.8, 2), (0.81, 1), (1, 0)]
)
def test_heads_at_or_above_the_quantile_stay_full(sparsity, full):
    gates = torch.tensor(GATES, dtype=torch.float64)
    system = DuoAttention(GATES, sparsity)
    assert sum(map(sum, system.full)) == full
    if sparsity < 1:
        at_or_above = gates >= gates.flatten().quantile(sparsity) - 1e-12
        assert system.full == tuple(map(tuple, at_or_above.tolist()))


def test_any_number_of_heads_may_be_full():
    for system in (SYSTEM, DuoAttention([[0.5]])):
        heads = system.most(0)
        assert [sum(map(sum, system.sized(size).full)) for size in range(heads + 1)] == list(range(heads + 1))


def test_of_equal_gates_the_share_is_kept_all_the_same():
    assert DuoAttention([[0, 0], [1, 0]], 0.5).full == ((True, False), (True, False))


def test_files_of_gates(tmp_path):
    table, nested = tmp_path / "full_attention_heads.tsv", tmp_path / "gates.json"
    table.write_text("9.0e-01\t1.000000e-01\n0.2\t0.3\n1.8\t-0.7\n")
    nested.write_text(json.dumps(GATES))
    assert DuoAttention(str(nested)) == DuoAttention(GATES)
    assert DuoAttention(str(table)).gates == ((0.9, 0.1), (0.2, 0.3), (1.0, 0.0))
    config = LRSAConfig(system=DuoAttention(str(table)))
    assert LRSAConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_pairs_are_the_mean_over_heads():
    seen = [[t + 1 if full else min(t + 1, 8) for t in range(30)] for row in SYSTEM.full for full in row]
    assert SYSTEM.attended_pairs(30) == sum(map(sum, seen)) // 6
    assert SYSTEM.attended_pairs(4) == 10


def test_a_model_says_the_same_with_and_without_a_cache_which_holds_less(model, ids):
    tokens, pads = ids(2, 34), [0, 9]
    mask = (torch.arange(34) >= torch.tensor(pads)[:, None]).long()
    with using(model, LRSAConfig(system=SYSTEM)), torch.no_grad():
        whole = model(tokens * mask, attention_mask=mask).logits
        for calls in (8, 33):
            cache = LRSACache.of(model)
            prefill(model, (tokens * mask)[:, :-1], cache, attention_mask=mask[:, :-1], tokens_per_call=calls)
            cache.end_prompt()
            last = model(tokens[:, -1:], attention_mask=mask, use_cache=True, **cache_argument(model, cache)).logits
            torch.testing.assert_close(last[:, 0], whole[:, -1], rtol=0, atol=1e-8)
        alone = model(tokens[1:, 9:]).logits
    torch.testing.assert_close(alone[0], whole[1, 9:], rtol=0, atol=1e-8)
    pairs = [34 + 8, 8 + 8, 34 + 34], [25 + 8, 8 + 8, 25 + 25]
    assert cache.nbytes == sum(map(sum, pairs)) * 2 * 8 * 8
    assert cache.stored_tokens() == [(first + second) / 2 for first, second in zip(*pairs, strict=True)]


def test_half_precision_errs_by_its_rounding():
    exact = random_qkv(20)
    wanted = by_head(*exact, SYSTEM.full[0])
    half = [x.bfloat16() for x in exact]
    for found in (SYSTEM.attend(*half, cu_seqlens=None, scale=SCALE, place=Place(0)),
                  SYSTEM.stream(Place(0), "auto").attend(*half, SCALE)):  # fmt: skip
        assert found.dtype == torch.bfloat16
        torch.testing.assert_close(found.double(), wanted, rtol=0, atol=0.05)


@pytest.mark.parametrize(
    ("arguments", "field"),
    [({"gates": []}, "gates"), ({"gates": [[0.1], [0.2, 0.3]]}, "gates"), ({"gates": [["a"]]}, "gates"),
     ({"gates": [[float("nan")]]}, "gates"), ({"sparsity": 1.5}, "sparsity"), ({"recent": 0}, "recent"),
     ({"sink_size": -1}, "sink_size"), ({"gates": "nowhere.tsv"}, "gates")],
)  # fmt: skip
def test_what_is_no_table_of_gates_is_refused(arguments, field):
    with refused(field):
        DuoAttention(**{"gates": GATES} | arguments)


def test_files_that_are_no_tables_and_gates_of_another_model_are_refused(model, tmp_path):
    file = tmp_path / "gates.tsv"
    file.write_text("0.1 x\n")
    with refused("gates", str(file), reason="neither JSON nor a table"):
        DuoAttention(str(file))
    wrong = LRSAConfig(system=DuoAttention([[0.1, 0.2]]))
    with refused("gates", reason="1 layers x 2 heads; the model has 3 x 2"), using(model, wrong):
        pass


def test_gates_that_no_float_holds_are_clipped_as_others():
    assert DuoAttention(gates=[[10**400, -(10**400)]]).gates == ((1.0, 0.0),)
