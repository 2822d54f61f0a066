"""Ranks that share rows attend as one process does: in float64, with gradients, whatever chooses and however it is cut.

Two and four processes run all cases, and each test looks at what they have found of one.
"""

import inspect
from typing import NamedTuple

import processes
import pytest
import torch
from helpers import boundaries, random_qkv
from torch import distributed

from lrsa_lit.context_parallel import SharedRows, Shares, exchange
from lrsa_lit.context_parallel.share_plan import Plan
from lrsa_lit.ops import sparse_attention as ops
from lrsa_lit.ops.sparse_attention import (
    Compressor,
    HeadRules,
    LagRelative,
    QueryAttention,
    Rotary,
    Rule,
    dense_attention,
    sparse_attention,
    with_scores,
)
from lrsa_lit.ops.sparse_attention.rule import KEEP_ALL

RULE = Rule(sink_size=3, lag_size=6, top_k=2, rotary=Rotary((0.7,)))
SETTINGS = {
    "QueryAttention": {"window": 3, "kernel": 3},
    "QueryRuns": {"window": 2, "size": 3},
    "ChunkWise": {"size": 2},
}
COMPRESSORS = {
    name: made(**SETTINGS.get(name, {}))
    for name, made in sorted(vars(ops).items())
    if inspect.isclass(made) and issubclass(made, Compressor) and not inspect.isabstract(made)
}


class Case(NamedTuple):
    """Rows of packed sequences, or several rows of one, and the rule under which they are attended to."""

    lengths: list[int]
    rule: Rule | HeadRules = RULE
    batch: int = 1


def ruled(**changes):
    return RULE.replace(**changes)


CASES = {name: Case([101], ruled(compressor=each)) for name, each in COMPRESSORS.items()} | {
    "three rows": Case([97], batch=3),
    "the shortest row": Case([48]),
    "no sinks": Case([64], ruled(sink_size=0)),
    "many sinks": Case([130], ruled(sink_size=15)),
    "nothing kept": Case([90], ruled(top_k=0)),
    "all kept": Case([90], ruled(top_k=6)),
    "chunks of two partitions": Case([131], ruled(chunk_size=12)),
    "chunks of one and a half": Case([131], ruled(chunk_size=9)),
    "chunks of five": Case([131], ruled(chunk_size=5, compressor=QueryAttention(window=2))),
    "a chunk of many partitions": Case([131], ruled(chunk_size=40)),
    "a chunk longer than the row": Case([131], ruled(chunk_size=200)),
    "dense": Case([75], KEEP_ALL),
    "K of each head": Case([101], HeadRules(ruled(compressor=LagRelative()), (2, 6))),
    "K of each head, by scores": Case([101], HeadRules(ruled(compressor=ops.TokenGate()), (0, 6))),
    "packed": Case([40, 7, 61, 1, 30]),
    "packed, dense": Case([40, 7, 61, 1, 30], KEEP_ALL),
    "packed, one long among short": Case([3, 5, 110, 4, 2, 1]),
    "packed, all short": Case([9, 14, 8, 3, 20, 17, 1, 12]),
    "packed, by queries": Case([40, 7, 61, 1, 30], ruled(compressor=QueryAttention(window=3), chunk_size=9)),
    "packed, by scores": Case([20, 30, 25, 40], ruled(compressor=ops.TokenGate())),
    "packed, biased": Case([20, 30, 25, 40], ruled(compressor=COMPRESSORS["Centroids"])),
}  # fmt: skip


def drawn(case):
    """Queries, keys with scores if need be, and values of whole rows."""
    query, key, value = random_qkv(sum(case.lengths), batch=case.batch, dim=6, grad=True)
    common = case.rule.common if isinstance(case.rule, HeadRules) else case.rule
    if common.compressor.takes_scores:
        scores = torch.randn(key.shape[:3], generator=torch.Generator().manual_seed(1), dtype=key.dtype)
        key = with_scores(key.detach(), scores).requires_grad_()
    return query, key, value


def of_one(case):
    """Output and gradients of one process."""
    tensors = drawn(case)
    packed = boundaries(case.lengths) if len(case.lengths) > 1 else None
    output = sparse_attention(*tensors, case.rule, cu_seqlens=packed, scale=0.3)
    return [output, *torch.autograd.grad((output * weights(output)).sum(), tensors)]


def weights(output):
    return torch.randn(output.shape, generator=torch.Generator().manual_seed(7), dtype=output.dtype)


def shares_of(case, ranks):
    return Shares.cut(boundaries(case.lengths).tolist(), ranks, RULE)


def own(tensor, shares, rank):
    return torch.cat([tensor[:, :, start:stop] for start, stop in shares.spans(rank)], dim=2)


def of_each(rank, port, ranks, folder):
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", world_size=ranks, rank=rank)
    found, came = {}, []
    monitor(came)
    for name, case in CASES.items():
        shares = shares_of(case, ranks)
        came.clear()
        tensors = [own(tensor.detach(), shares, rank).requires_grad_() for tensor in drawn(case)]
        shared = SharedRows(shares, distributed.group.WORLD)
        output = shared.attend(*tensors, case.rule, scale=0.3)
        received = sum(came)
        weighted = output * own(weights(of_one(case)[0]), shares, rank)
        found[name] = [output.detach(), *torch.autograd.grad(weighted.sum(), tensors), received, sum(came)]
    torch.save(found, folder / f"{rank}.pt")


def monitor(came):
    """Note how many numbers each call brings from other ranks."""

    def to_all(output, given, incoming, outgoing, *, group, call=exchange.all_to_all):
        came.append(output.numel() // max(sum(incoming), 1) * (sum(incoming) - incoming[group.rank()]))
        return call(output, given, incoming, outgoing, group=group)

    def noted(call):
        def run(output, given, **options):
            came.append(abs(output.numel() - given.numel()))
            return call(output, given, **options)

        return run

    exchange.all_to_all, exchange.all_gather = to_all, noted(exchange.all_gather)
    exchange.reduce_scatter = noted(exchange.reduce_scatter)


@pytest.fixture(scope="module", params=[2, 4], ids=["two ranks", "four ranks"])
def found(request, tmp_path_factory):
    """What each rank has found."""
    folder = tmp_path_factory.mktemp("ranks")
    processes.start(of_each, request.param, folder, count=request.param)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(request.param)]


@pytest.mark.parametrize("name", CASES)
def test_ranks_find_what_one_process_does(name, found):
    case = CASES[name]
    shares = shares_of(case, len(found))
    for number, wanted in enumerate(of_one(case)):
        for rank, results in enumerate(found):
            torch.testing.assert_close(results[name][number], own(wanted, shares, rank), atol=1e-12, rtol=1e-9)
    # The test could not fail if nothing were dropped.
    packed = boundaries(case.lengths) if len(case.lengths) > 1 else None
    query, key, value = drawn(case)
    everything = dense_attention(query, key[..., :6], value, cu_seqlens=packed, scale=0.3)
    assert torch.allclose(everything, of_one(case)[0]) == ("dense" in name or name == "all kept")


@pytest.mark.parametrize("name", ["LagRelative", "three rows", "packed", "dense"])
def test_ranks_receive_what_the_plan_counts(name, found):
    case = CASES[name]
    plan = Plan(shares_of(case, len(found)), case.rule)
    returned = 0
    for rank, results in enumerate(found):
        *_, forward, both = results[name]
        # Of two heads, a key and a value of six channels.
        assert forward == sum(plan.received(rank)) * case.batch * 2 * 12
        returned += both - forward
    assert returned == sum(results[name][-2] for results in found)
