"""Heads that differ in K: each is what an oracle makes of it alone, with its own K."""

import pytest
import torch
from helpers import boundaries, mean_pool, oracle_attention, random_qkv, refused

from lrsa_lit.ops.sparse_attention import (
    GroupedStream,
    HeadGroups,
    HeadRules,
    LagRelative,
    MeanPool,
    QueryAttention,
    RandomTokens,
    Rule,
    select,
    sparse_attention,
    stored_size,
)

BASE = Rule(sink_size=2, lag_size=8, top_k=3)
HEADS = [(3, 0, 8, 3), (8, 0, 0, 5), (0, 8, 0, 8)]


def each_alone(query, key, value, rules, **options):
    """(B, Hq, T, D) of an oracle that sees one key-value head at a time."""
    group = query.shape[1] // key.shape[1]
    outputs = [
        oracle_attention(q, k, v, rules.common.replace(top_k=top_k), **options)
        for q, k, v, top_k in zip(query.split(group, 1), key.split(1, 1), value.split(1, 1), rules.top_k, strict=True)
    ]
    return torch.cat(outputs, dim=1)


def assert_same(got, expected, tensors):
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    weights = torch.linspace(-1, 1, got.numel(), dtype=got.dtype).view_as(got)
    for ours, theirs in zip(*(torch.autograd.grad(out, tensors, weights) for out in (got, expected)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-11)


@pytest.mark.parametrize("top_k", HEADS, ids=str)
@pytest.mark.parametrize("group", [1, 2])
def test_values_and_gradients_are_those_of_each_head_alone(top_k, group):
    tensors, rules = random_qkv(67, batch=2, heads=4, group=group, grad=True), HeadRules(BASE, top_k)
    assert_same(sparse_attention(*tensors, rules), each_alone(*tensors, rules), tensors)


def test_packed_sequences_new_pairs_and_another_chunk():
    rules = HeadRules(BASE.replace(compressor=MeanPool(), chunk_size=5), (4, 8, 0, 4))
    tensors, lengths = random_qkv(75, heads=4, group=2, grad=True), [44, 1, 30]
    got = sparse_attention(*tensors, rules, cu_seqlens=boundaries(lengths))
    assert_same(got, each_alone(*tensors, rules, lengths=lengths, compress=mean_pool), tensors)


@pytest.mark.parametrize("compressor", [LagRelative(), RandomTokens(seed=3), QueryAttention(window=3)], ids=repr)
@pytest.mark.parametrize("sizes", [[90], [1, 17, 1, 40, 31], [60] + [1] * 30], ids=len)
def test_any_split_over_calls_is_the_parallel_pass(compressor, sizes):
    query, key, value = random_qkv(90, batch=2, heads=4, group=2)
    rules = HeadRules(BASE.replace(compressor=compressor), (3, 0, 8, 3))
    stream, outputs, start = GroupedStream.of(rules, "eager"), [], 0
    with torch.no_grad():
        for size in sizes:
            part = slice(start, start + size)
            outputs.append(stream.attend(query[:, :, part], key[:, :, part], value[:, :, part], 5**-0.5))
            start += size
            stream = stream.rows(torch.tensor([0, 1]))
    torch.testing.assert_close(torch.cat(outputs, dim=2), sparse_attention(query, key, value, rules))
    assert stream.seen == 90
    assert stream.end_prompt() is None


def test_memory_is_the_sum_of_what_each_head_keeps():
    rules = HeadRules(BASE, (3, 0, 8, 3))
    query, key, value = random_qkv(300, heads=4, group=2)
    stream = GroupedStream.of(rules, "eager")
    with torch.no_grad():
        for part in (slice(0, 250), slice(250, 299), slice(299, 300)):
            stream.attend(query[:, :, part], key[:, :, part], value[:, :, part], 1.0)
    of_heads = [[stored_size(end, BASE.replace(top_k=top_k)) for end in (250, 299, 300)] for top_k in rules.top_k]
    size = 2 * key.shape[3] * 8
    held = {part.untyped_storage() for each in stream.parts for part in each.buffer.whole}
    allocated = sum(storage.nbytes() for storage in held)
    assert stream.nbytes == sum(sizes[-1] for sizes in of_heads) * size
    # Memory is that of the fullest moment: a head of K = 0 has held more before the last compression.
    assert stream.nbytes <= allocated <= sum(map(max, of_heads)) * size * 33 / 32


def test_random_heads_choose_as_they_do_among_all():
    key = random_qkv(60, heads=4)[1]
    rule = BASE.replace(compressor=RandomTokens(seed=5))
    equal = select(key, key, rule).indices
    rules = HeadRules(rule, (3, 1, 3, 1))
    heads, group = rules.groups.heads[0], rules.rules[0]
    assert heads == (0, 2)
    kept = select(key[:, list(heads)], key[:, list(heads)], group).indices
    assert kept.equal(equal[:, list(heads)])
    assert not kept.equal(equal[:, :2])


def test_neighbours_are_views_and_others_come_back_in_their_places():
    tensor = torch.arange(6.0).view(1, 6, 1, 1).expand(2, 6, 3, 4).contiguous()
    apart = HeadGroups(((0, 2), (1,)))
    together = HeadGroups(((0, 1), (2,)))
    assert [part[0, :, 0, 0].tolist() for part in apart.split(tensor)] == [[0, 1, 4, 5], [2, 3]]
    assert all(part.untyped_storage().data_ptr() == tensor.data_ptr() for part in together.split(tensor))
    for groups in (apart, together):
        assert groups.join(groups.split(tensor)).equal(tensor)
        assert groups.join_into(torch.zeros_like(tensor), groups.split(tensor)).equal(tensor)


def test_bad_input():
    query, key, value = random_qkv(40, heads=4)
    rules = HeadRules(BASE, (3, 0, 3))
    with refused("head_top_k", reason="has K of 3 heads; the layer has 4"):
        sparse_attention(query, key, value, rules)
    with refused("head_top_k", reason="the layer has 4"):
        GroupedStream.of(rules, "eager").attend(query, key, value, 1.0)
    with refused("top_k", 9):
        HeadRules(BASE, (9, 0))
    with refused("compressor.shared_heads", True):
        HeadRules(BASE.replace(compressor=QueryAttention(window=2, shared_heads=True)), (1, 2))
    with refused("selection"):
        sparse_attention(query, key, value, HeadRules(BASE, (3, 0, 3, 1)), selection=select(key, value, BASE))
