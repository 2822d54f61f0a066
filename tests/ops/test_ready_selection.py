"""``sparse_attention(…, selection=…)``: what was selected before, by another call or another rule."""

import dataclasses

import pytest
import torch
from helpers import boundaries, oracle_attention, random_qkv, refused

from lrsa_lit.ops.sparse_attention import Recency, Rule, Selection, select, sparse_attention

RULE = Rule(sink_size=2, lag_size=8, top_k=3)


@pytest.mark.parametrize("rule", [RULE, RULE.replace(compressor=Recency())], ids=["its-own", "another-rule's"])
@pytest.mark.parametrize("lengths", [None, [60], [10, 50], [1, 5, 0, 40, 14]], ids=str)
def test_a_ready_selection_gives_the_bits_of_the_rule_that_selected(lengths, rule):
    query, key, value = random_qkv(60)
    packed = {} if lengths is None else {"cu_seqlens": boundaries(lengths)}
    ours = sparse_attention(query, key, value, RULE, selection=select(key, value, rule, **packed), **packed)
    assert ours.equal(sparse_attention(query, key, value, rule, **packed))
    assert ours.equal(sparse_attention(query, key, value, RULE, **packed)) == (rule == RULE)


def test_a_ready_selection_serves_fewer_queries_and_passes_gradient():
    query, key, value = random_qkv(60, queries=7, grad=True)
    selection = select(key, value, RULE)
    ours = sparse_attention(query, key, value, RULE, selection=selection)
    theirs = oracle_attention(query, key, value, RULE)
    torch.testing.assert_close(ours, theirs)
    for mine, reference in zip(
        torch.autograd.grad(ours.square().sum(), (key, value)),
        torch.autograd.grad(theirs.square().sum(), (key, value)),
        strict=True,
    ):
        torch.testing.assert_close(mine, reference)


@pytest.mark.parametrize(
    "cut",
    [
        lambda s: Selection(s.indices[:, :, :-1], s.scores[:, :, :-1]),
        lambda s: Selection(s.indices[..., :-1], s.scores),
        lambda s: Selection(s.indices[:, :1], s.scores[:, :1]),
        lambda s: Selection(s.indices.expand(2, -1, -1, -1), s.scores),
    ],
    ids=["partitions", "top_k", "heads", "batch"],
)
def test_a_selection_of_another_shape_is_refused(cut):
    query, key, value = random_qkv(60)
    wrong = cut(select(key, value, RULE))
    with refused("selection", tuple(wrong.indices.shape), "(1, 2, 6, 3)"):
        sparse_attention(query, key, value, RULE, selection=wrong)


def test_a_selection_is_frozen():
    selection = select(*random_qkv(60)[1:], RULE)
    with pytest.raises(dataclasses.FrozenInstanceError):
        selection.indices = selection.indices + 1
