"""Shared rows by the Triton kernels, against the whole rows: one rank holds both of its shares."""

import pytest
import torch
from helpers import boundaries, random_qkv
from ops.triton.oracle import DEVICE
from torch import distributed

from lrsa_lit.context_parallel import SharedRows, Shares
from lrsa_lit.ops.sparse_attention import HeadRules, MeanPool, QueryAttention, Rule, sparse_attention
from lrsa_lit.ops.sparse_attention.rule import KEEP_ALL

RULE = Rule(sink_size=2, lag_size=8, top_k=3)
CASES = {
    "a row": ([61], RULE),
    "by queries": ([61], RULE.replace(compressor=QueryAttention(window=3), chunk_size=16)),
    "new pairs": ([53], RULE.replace(compressor=MeanPool())),
    "K of each head": ([45], HeadRules(RULE, (3, 8))),
    "packed": ([22, 5, 30, 20], RULE),
    "dense": ([35], None),
}


@pytest.fixture(scope="module")
def group():
    backend = "nccl" if DEVICE == "cuda" else "gloo"
    distributed.init_process_group(backend, store=distributed.HashStore(), rank=0, world_size=1)
    yield distributed.group.WORLD
    distributed.destroy_process_group()


@pytest.mark.parametrize("name", CASES)
def test_one_rank_finds_what_it_finds_in_whole_rows(name, group):
    lengths, rule = CASES[name]
    tensors = [
        tensor.to(DEVICE).requires_grad_() for tensor in random_qkv(sum(lengths), group=1, dim=16, dtype=torch.float32)
    ]
    packed, results = boundaries(lengths), []
    shared = SharedRows(Shares.cut(packed.tolist(), 1, RULE), group)
    whole = {"cu_seqlens": packed if len(lengths) > 1 else None, "scale": 0.25, "impl": "eager"}
    for output in (
        shared.attend(*tensors, rule, scale=0.25, impl="triton"),
        sparse_attention(*tensors, KEEP_ALL if rule is None else rule, **whole),
    ):
        weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(7)).to(DEVICE)
        results.append([output, *torch.autograd.grad((output * weights).sum(), tensors)])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)
