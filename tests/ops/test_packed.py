"""Sequences packed in one row: each gets what it gets alone, and none sees a neighbour."""

import itertools

import pytest
import torch
from helpers import boundaries, oracle_attention, random_qkv

from lrsa_lit.ops.sparse_attention import MeanPool, RandomTokens, Rule, sparse_attention

RULE = Rule(sink_size=4, lag_size=16, top_k=4)
LENGTHS = [1, 5, 300, 0, 36, 37, 120]
COMPRESSORS = [RULE.compressor, RandomTokens(), MeanPool()]
compressors = pytest.mark.parametrize("compressor", COMPRESSORS, ids=lambda c: type(c).__name__)


def blocks(lengths):
    edges = boundaries(lengths).tolist()
    return [slice(start, stop) for start, stop in itertools.pairwise(edges) if stop > start]


@compressors
@pytest.mark.parametrize("victim", [0, 1, 2, 3, 4, 5], ids=lambda n: f"sequence{n}")
def test_a_perturbed_sequence_moves_no_neighbour(compressor, victim):
    rule = RULE.replace(compressor=compressor)
    tensors, block = random_qkv(sum(LENGTHS)), blocks(LENGTHS)[victim]
    changed = [tensor.clone() for tensor in tensors]
    for tensor in changed:
        tensor[:, :, block] = tensor[:, :, block] * -100 + 7
    before = sparse_attention(*tensors, rule, cu_seqlens=boundaries(LENGTHS))
    after = sparse_attention(*changed, rule, cu_seqlens=boundaries(LENGTHS))
    assert not torch.allclose(before[:, :, block], after[:, :, block])
    before[:, :, block] = after[:, :, block] = 0
    assert after.equal(before)


@compressors
@pytest.mark.parametrize("victim", [2, 4], ids=lambda n: f"sequence{n}")
def test_gradients_stay_inside_their_sequence(compressor, victim):
    rule = RULE.replace(compressor=compressor)
    tensors, block = random_qkv(sum(LENGTHS), grad=True), blocks(LENGTHS)[victim]
    output = sparse_attention(*tensors, rule, cu_seqlens=boundaries(LENGTHS))
    for gradient in torch.autograd.grad(output[:, :, block].square().sum(), tensors):
        assert gradient[:, :, block].abs().sum() > 0
        gradient[:, :, block] = 0
        assert gradient.equal(torch.zeros_like(gradient))


def test_packed_is_not_the_row_as_one_sequence():
    tensors = random_qkv(sum(LENGTHS))
    packed = sparse_attention(*tensors, RULE, cu_seqlens=boundaries(LENGTHS))
    assert not torch.allclose(packed, sparse_attention(*tensors, RULE))


@pytest.mark.parametrize("lengths", [[75], [0, 75], [75, 0, 0], [1] * 75, [37, 38]], ids=str)
def test_the_oracle_agrees_on_odd_packings(lengths):
    tensors = random_qkv(75)
    ours = sparse_attention(*tensors, RULE, cu_seqlens=boundaries(lengths))
    torch.testing.assert_close(ours, oracle_attention(*tensors, RULE, lengths=lengths))


def test_boundaries_may_be_int64():
    tensors = random_qkv(75)
    ours = sparse_attention(*tensors, RULE, cu_seqlens=boundaries([30, 45]).long())
    assert ours.equal(sparse_attention(*tensors, RULE, cu_seqlens=boundaries([30, 45])))
