"""All heads of a layer keep the tokens whose scores, summed over them, are the highest."""

import pytest
import torch
from helpers import random_qkv, refused

from lrsa_lit.ops.sparse_attention import KeyDiff, LagRelative, Rule, SharedHeads, TokenGate, select


@pytest.mark.parametrize("of", [LagRelative(), KeyDiff()])
def test_the_sums_decide(of):
    _, key, value = random_qkv(60, heads=2)
    rule = Rule(sink_size=3, lag_size=8, top_k=3, compressor=of)
    apart = select(key, value, rule)
    found = select(key, value, rule.replace(compressor=SharedHeads(of)))
    assert torch.equal(found.indices, found.indices[:, :1].expand_as(found.indices))
    sums = apart.scores.sum(dim=1)
    expected = sums.topk(3, dim=-1).indices.sort(dim=-1).values
    assert torch.equal((found.indices[:, 0] - 3) % 8, expected)
    assert not torch.equal(apart.indices[:, 0], apart.indices[:, 1]), "heads differ, or nothing was shared"


def test_what_it_may_be_of():
    assert SharedHeads({"class_path": "KeyDiff"}) == SharedHeads(KeyDiff())
    assert SharedHeads.from_dict(SharedHeads(KeyDiff()).to_dict()) == SharedHeads(KeyDiff())
    with refused("of", "TokenGate"):
        SharedHeads(TokenGate())
    with refused("of", "MeanPool"):
        SharedHeads("MeanPool")
