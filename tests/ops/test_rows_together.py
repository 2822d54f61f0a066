"""Rows of unequal lengths that attend together get what each gets alone, and hold the same."""

import contextlib
import itertools

import pytest
import torch
from helpers import random_qkv
from hypothesis import given, settings
from hypothesis import strategies as st

from lrsa_lit.ops.sparse_attention import (
    Centroids,
    GroupedStream,
    HeadRules,
    KeyValueStream,
    QueryAttention,
    RandomTokens,
    Rule,
    TokenGate,
    attend_together,
    can_attend_together,
)

SCALE = 0.4
RULE = Rule(sink_size=3, lag_size=8, top_k=3)
LENGTHS = [40, 1, 2, 17, 63, 20]
"""Of one token, shorter than the sinks, the last that sees all, the first that does not, and longer ones."""
RULES = {
    "lag-relative": RULE,
    "dense": None,
    "window-only": RULE.replace(top_k=0),
    "everything-kept": RULE.replace(top_k=8),
    "no-sinks-odd-chunk": RULE.replace(sink_size=0, chunk_size=5),
    "queries": RULE.replace(compressor=QueryAttention(window=2), chunk_size=12),
    "biased": RULE.replace(compressor=Centroids()),
    "heads-differ": HeadRules(RULE, (5, 1)),
    "heads-differ-in-turn": HeadRules(RULE.replace(compressor=RandomTokens()), (5, 0, 5)),
}


def empty(rule, impl="eager"):
    return GroupedStream.of(rule, impl) if isinstance(rule, HeadRules) else KeyValueStream(rule, impl)


def together(streams, rows):
    """The output of each row, from one call."""
    sizes = [row[1].shape[2] for row in rows]
    packed = [torch.cat(parts, dim=2) for parts in zip(*rows, strict=True)]
    assert can_attend_together(streams)
    return attend_together(streams, *packed, [0, *itertools.accumulate(sizes)], SCALE).split(sizes, dim=2)


def assert_same_content(ours, theirs):
    assert ours.seen == theirs.seen
    assert ours.nbytes == theirs.nbytes
    assert ours.attended_pairs == theirs.attended_pairs
    for mine, other in zip(ours.parts, theirs.parts, strict=True):
        assert (mine.seen, mine.partitions) == (other.seen, other.partitions)
        assert mine.held.keys() == other.held.keys()
        for name, tensors in mine.held.items():
            for got, wanted in zip(tensors, other.held[name], strict=True):
                assert got.shape == wanted.shape
                assert torch.equal(got, wanted) or getattr(mine.rule.compressor, "has_bias", False)
                torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)


def close(ours, theirs, atol=1e-12):
    torch.testing.assert_close(ours, theirs, rtol=0, atol=atol)


CALLS = [LENGTHS, [1, 5, 0, 19, 2, 30], [12, 1, 40, 1, 1, 0], [8, 8, 8, 8, 8, 8], [1, 1, 1, 1, 1, 1]]
"""New tokens of each row in one call after another: within a chunk, across compressions, and none."""


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@torch.no_grad()
def test_rows_get_what_each_gets_alone_and_hold_the_same(rule):
    assert_as_alone(rule, CALLS)


def assert_as_alone(rule, calls):
    heads = len(rule.top_k) if isinstance(rule, HeadRules) else 2
    totals = [max(sum(sizes), 1) for sizes in zip(*calls, strict=True)]
    whole = [random_qkv(total, heads=heads, seed=row) for row, total in enumerate(totals)]
    streams, alone = ([empty(rule) for _ in whole] for _ in range(2))
    for number, sizes in enumerate(calls):
        rows = [row for row, size in enumerate(sizes) if size]
        starts = [sum(call[row] for call in calls[:number]) for row in rows]
        new = [
            [part[:, :, start : start + sizes[row]] for part in whole[row]]
            for row, start in zip(rows, starts, strict=True)
        ]
        outputs = together([streams[row] for row in rows], new)
        for row, tokens, output in zip(rows, new, outputs, strict=True):
            close(output, alone[row].attend(*tokens, SCALE))
            assert_same_content(streams[row], alone[row])


@st.composite
def cases(draw):
    lag = draw(st.integers(2, 8))
    rule = Rule(
        sink_size=draw(st.integers(0, 5)),
        lag_size=lag,
        top_k=draw(st.integers(0, lag)),
        chunk_size=draw(st.one_of(st.none(), st.integers(1, 2 * lag + 1))),
        compressor=draw(st.sampled_from([RULE.compressor, RandomTokens(2), QueryAttention(window=2)])),
    )
    rows = draw(st.integers(1, 4))
    sizes = st.lists(st.integers(0, 30), min_size=rows, max_size=rows).filter(any)
    return rule, draw(st.lists(sizes, min_size=1, max_size=4))


@settings(max_examples=60)
@given(cases())
@torch.no_grad()
def test_whatever_the_rule_and_the_calls(case):
    assert_as_alone(*case)


@pytest.mark.parametrize("name", ["lag-relative", "biased", "heads-differ"])
def test_gradients_are_those_of_rows_alone(name):
    rows = [random_qkv(length + 12, seed=length, grad=True) for length in LENGTHS]
    calls = [[[part[:, :, place] for part in row] for row in rows] for place in (slice(-12), slice(-12, None))]
    streams, losses = [empty(RULES[name]) for _ in rows], []
    for new in calls:
        losses += [output.square().sum() for output in together(streams, new)]
    alone = [empty(RULES[name]) for _ in rows]
    wanted = [
        stream.attend(*tokens, SCALE).square().sum() for new in calls for stream, tokens in zip(alone, new, strict=True)
    ]
    leaves = list(itertools.chain(*rows))
    for ours, theirs in zip(*(torch.autograd.grad(sum(each), leaves) for each in (losses, wanted)), strict=True):
        close(ours, theirs, 1e-10)


@pytest.mark.parametrize(("name", "grad"), [("lag-relative", True), ("queries", False)])
@pytest.mark.filterwarnings("ignore:overflow encountered in multiply")
def test_kernels_give_rows_what_each_gets_alone(name, grad):
    rows = [random_qkv(length, heads=1, dim=16, seed=length, dtype=torch.float32, grad=grad) for length in (24, 22)]
    cuts = [(0, 20, 24), (0, 1, 22)]
    streams, alone = ([empty(RULES[name], "triton") for _ in rows] for _ in range(2))
    losses, wanted = [], []
    with contextlib.nullcontext() if grad else torch.no_grad():
        for call in range(2):
            new = [[part[:, :, cut[call] : cut[call + 1]] for part in row] for row, cut in zip(rows, cuts, strict=True)]
            for output, stream, other, tokens in zip(together(streams, new), streams, alone, new, strict=True):
                single = other.attend(*tokens, SCALE)
                close(output, single, 1e-5)
                assert_same_content(stream, other)
                losses.append(output.square().sum())
                wanted.append(single.square().sum())
    if grad:
        leaves = list(itertools.chain(*rows))
        for ours, theirs in zip(*(torch.autograd.grad(sum(each), leaves) for each in (losses, wanted)), strict=True):
            close(ours, theirs, 1e-4)


def test_what_does_more_with_its_tokens_goes_row_by_row():
    class Other(KeyValueStream):
        pass

    class Parted(KeyValueStream):
        parts = (KeyValueStream(None),)

    assert can_attend_together([empty(RULE), empty(RULE)])
    assert not can_attend_together([Other(RULE), Other(RULE)])
    assert not can_attend_together([Parted(None), Parted(None)])
    assert can_attend_together([empty(RULE.replace(compressor=TokenGate())) for _ in range(2)])
    assert not can_attend_together([empty(RULES["heads-differ"]), empty(RULE)])
