"""Rows of unequal lengths that start together get what each gets alone, and hold the same."""

import itertools

import pytest
import torch
from helpers import random_qkv

from lrsa_lit.ops.sparse_attention import (
    Centroids,
    GroupedStream,
    HeadRules,
    KeyValueStream,
    QueryAttention,
    RandomTokens,
    Rule,
    TokenGate,
    can_start_together,
    start_together,
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


def packed(rows):
    return [torch.cat(parts, dim=2) for parts in zip(*rows, strict=True)]


def both(rule, rows, impl="eager"):
    """Outputs and streams: of the rows together, and of each alone."""
    boundaries = [0, *itertools.accumulate(row[1].shape[2] for row in rows)]
    streams, alone = ([empty(rule, impl) for _ in rows] for _ in range(2))
    assert can_start_together(streams)
    output = start_together(streams, *packed(rows), boundaries, SCALE)
    outputs = output.split([row[1].shape[2] for row in rows], dim=2)
    return list(zip(outputs, streams, strict=True)), [
        (stream.attend(*row, SCALE), stream) for row, stream in zip(rows, alone, strict=True)
    ]


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


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_rows_get_what_each_gets_alone_and_go_on_as_it_does(rule):
    heads = len(rule.top_k) if isinstance(rule, HeadRules) else 2
    whole = [random_qkv(length + 30, heads=heads, group=2, seed=length) for length in LENGTHS]
    rows = [[part[:, :, :length] for part in parts] for parts, length in zip(whole, LENGTHS, strict=True)]
    with torch.no_grad():
        together, alone = both(rule, rows)
        for parts, length, (output, stream), (wanted, other) in zip(whole, LENGTHS, together, alone, strict=True):
            torch.testing.assert_close(output, wanted, rtol=0, atol=1e-12)
            assert_same_content(stream, other)
            at = length
            for size in (1, 1, 19, 1, 8):
                later = [part[:, :, at : at + size] for part in parts]
                torch.testing.assert_close(
                    stream.attend(*later, SCALE), other.attend(*later, SCALE), rtol=0, atol=1e-12
                )
                at += size
            assert_same_content(stream, other)


@pytest.mark.parametrize("name", ["lag-relative", "biased", "heads-differ"])
def test_gradients_are_those_of_rows_alone(name):
    rows = [random_qkv(length, seed=length, grad=True) for length in LENGTHS]
    together, alone = both(RULES[name], rows)
    leaves = list(itertools.chain(*rows))
    ours, theirs = (
        torch.autograd.grad(sum(out.square().sum() for out, _ in each), leaves) for each in (together, alone)
    )
    for got, wanted in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ["lag-relative", "queries"])
@pytest.mark.filterwarnings("ignore:overflow encountered in multiply")
def test_kernels_give_the_rows_what_each_gets_alone(name):
    rows = [random_qkv(length, dim=16, seed=length, dtype=torch.float32) for length in (27, 1, 22)]
    with torch.no_grad():
        together, alone = both(RULES[name], rows, impl="triton")
    for (output, stream), (wanted, other) in zip(together, alone, strict=True):
        torch.testing.assert_close(output, wanted, rtol=0, atol=1e-4)
        assert_same_content(stream, other)


def test_what_does_more_with_its_tokens_goes_row_by_row():
    started = KeyValueStream(RULE)
    started.attend(*random_qkv(3), SCALE)

    class Other(KeyValueStream):
        pass

    assert can_start_together([empty(RULE), empty(RULE)])
    assert not can_start_together([empty(RULE), started])
    assert not can_start_together([Other(RULE), Other(RULE)])
    assert not can_start_together([empty(RULE.replace(compressor=TokenGate())) for _ in range(2)])
    assert not can_start_together([empty(RULES["heads-differ"]), empty(RULE)])
