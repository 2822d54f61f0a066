"""Sequences packed in one row; tests/conformance holds that each gets what it gets alone, gradients too."""

import pytest
import torch
from helpers import boundaries, oracle_attention, random_qkv

from lrsa_lit.ops.sparse_attention import Rule, sparse_attention

RULE = Rule(sink_size=4, lag_size=16, top_k=4)


@pytest.mark.parametrize("lengths", [[75], [0, 75], [75, 0, 0], [1] * 75, [37, 38]], ids=str)
def test_the_oracle_agrees_on_odd_packings(lengths):
    tensors = random_qkv(75)
    ours = sparse_attention(*tensors, RULE, cu_seqlens=boundaries(lengths))
    torch.testing.assert_close(ours, oracle_attention(*tensors, RULE, lengths=lengths))


def test_boundaries_may_be_int64():
    tensors = random_qkv(75)
    ours = sparse_attention(*tensors, RULE, cu_seqlens=boundaries([30, 45]).long())
    assert ours.equal(sparse_attention(*tensors, RULE, cu_seqlens=boundaries([30, 45])))
