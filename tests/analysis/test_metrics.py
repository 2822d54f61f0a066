"""Metrics of selections against an oracle of sets and loops in float64."""

import itertools
import math

import numpy as np
import pytest
from helpers import refused
from hypothesis import example, given
from hypothesis import strategies as st

from lrsa_lit.analysis import metrics
from lrsa_lit.attention import LRSAConfig


@st.composite
def rules(draw):
    lag = draw(st.integers(2, 7))
    return LRSAConfig(sink_size=draw(st.integers(0, 3)), lag_size=lag, top_k=draw(st.integers(0, lag)))


lengths = st.lists(st.integers(1, 60), min_size=1, max_size=3)
spans = st.lists(st.tuples(st.integers(0, 50), st.integers(0, 12)).map(lambda s: (s[0], s[0] + s[1])), max_size=3)


def heads_of(record, sample):
    """The set of positions that each head of each layer keeps."""
    return [[set(map(int, head.flatten())) for head in layer] for layer in sample.positions]


def in_partitions(record, sample):
    """Positions in compressed partitions, counted by hand."""
    start = record.rule["sink_size"]
    return list(range(start, start + sample.positions.shape[2] * record.rule["lag_size"]))


def same(found, expected):
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)


def ratio(part, whole):
    return part / whole if whole else math.nan


@given(rules(), lengths, spans, st.integers(1, 3), st.integers(1, 3), st.integers(0, 99))
def test_survival(drawn, rule, lengths, spans, layers, heads, seed):
    record = drawn(tuple(lengths), rule=rule, layers=layers, heads=heads, seed=seed, gold=tuple(spans))
    found = metrics.survival(record, "gold")
    asked = [
        {t for t in in_partitions(record, sample) if any(a <= t < b for a, b in sample.gold_spans)}
        for sample in record.samples
    ]
    kept = [heads_of(record, sample) for sample in record.samples]
    total = sum(map(len, asked))
    assert found.tokens == total
    by_head = [
        [ratio(sum(len(asked[n] & kept[n][i][h]) for n in range(len(asked))), total) for h in range(heads)]
        for i in range(layers)
    ]
    union = [set().union(*itertools.chain(*kept[n])) for n in range(len(asked))]
    same(found.by_head, by_head)
    same(found.anywhere, ratio(sum(len(asked[n] & union[n]) for n in range(len(asked))), total))
    same(found.mean, np.mean(by_head))
    miss = 1 - rule.top_k / rule.lag_size
    same([found.chance, found.chance_anywhere], [1 - miss, 1 - miss ** (heads * layers)])


def test_random_selections_survive_as_chance_says(drawn):
    record = drawn((4000,), rule=LRSAConfig(sink_size=4, lag_size=32, top_k=8), layers=4, heads=3, gold=((0, 4000),))
    found = metrics.survival(record, "gold")
    same(found.by_head, np.full((4, 3), 0.25))
    assert found.anywhere == pytest.approx(found.chance_anywhere, abs=0.01)


@given(rules(), lengths, st.integers(1, 9), st.integers(1, 3), st.integers(1, 3), st.integers(0, 99))
def test_by_place(drawn, rule, lengths, parts, layers, heads, seed):
    record = drawn(tuple(lengths), rule=rule, layers=layers, heads=heads, seed=seed)
    kept, there = np.zeros((layers, parts)), np.zeros(parts)
    for sample in record.samples:
        for t in in_partitions(record, sample):
            part = (t - rule.sink_size) % rule.lag_size * parts // rule.lag_size
            there[part] += heads
            for i, each in enumerate(heads_of(record, sample)):
                kept[i, part] += sum(t in head for head in each)
    same(metrics.by_place(record, parts), [[ratio(kept[i, n], there[n]) for n in range(parts)] for i in range(layers)])


def test_sinks_and_the_raw_window_do_not_count(drawn):
    record = drawn((40,), gold=((0, 2), (34, 40)))
    found = metrics.survival(record, "gold")
    assert record.compressed(record.samples[0]) == slice(2, 26)
    assert found.tokens == 0
    assert np.isnan(found.by_head).all()
    assert math.isnan(found.anywhere)


def kappa_by_counting(one, other, universe):
    """Cohen's kappa of two raters who say kept or not of each token."""
    n = len(universe)
    if not n:
        return math.nan
    observed = sum((t in one) == (t in other) for t in universe) / n
    p, q = len(one) / n, len(other) / n
    expected = p * q + (1 - p) * (1 - q)
    return math.nan if expected == 1 else (observed - expected) / (1 - expected)


def numbered(sets):
    """The sets of several samples as one, its members apart."""
    return {(n, t) for n, members in enumerate(sets) for t in members}


@given(rules(), lengths, st.integers(1, 3), st.integers(1, 3), st.integers(0, 99))
def test_agreement(drawn, rule, lengths, layers, heads, seed):
    record = drawn(tuple(lengths), rule=rule, layers=layers, heads=heads, seed=seed)
    universe = numbered(in_partitions(record, sample) for sample in record.samples)
    kept = [heads_of(record, sample) for sample in record.samples]
    flat = [numbered(sample[i][h] for sample in kept) for i in range(layers) for h in range(heads)]
    found = metrics.agreement(record)
    for i, j in itertools.product(range(layers), repeat=2):
        pairs = [
            kappa_by_counting(flat[i * heads + g], flat[j * heads + h], universe)
            for g, h in itertools.product(range(heads), repeat=2)
            if (i, g) != (j, h)
        ]
        defined = [value for value in pairs if not math.isnan(value)]
        same(found[i, j], np.mean(defined) if defined else math.nan)


@example(LRSAConfig(sink_size=0, lag_size=7, top_k=3), LRSAConfig(sink_size=3, lag_size=2, top_k=1), [12], 1, 0)
@given(rules(), rules(), lengths, st.integers(1, 3), st.integers(0, 99))
def test_agreement_of_two_rules(drawn, rule, other, lengths, heads, seed):
    records = [drawn(tuple(lengths), rule=r, layers=2, heads=heads, seed=seed + n) for n, r in enumerate((rule, other))]
    universe = [
        set(in_partitions(records[0], one)) & set(in_partitions(records[1], two))
        for one, two in zip(records[0].samples, records[1].samples, strict=True)
    ]
    found = metrics.agreement_between(*records)
    for i, h in itertools.product(range(2), range(heads)):
        a, b = (numbered(heads_of(r, s)[i][h] & universe[n] for n, s in enumerate(r.samples)) for r in records)
        same(found[i, h], kappa_by_counting(a, b, numbered(universe)))


def test_kappa_is_zero_by_chance_and_one_with_itself(drawn):
    rule = LRSAConfig(sink_size=4, lag_size=32, top_k=8)
    one, other = (drawn((6000,), rule=rule, seed=seed) for seed in (0, 1))
    same(metrics.agreement_between(one, one), np.ones((3, 2)))
    assert metrics.agreement_between(one, other) == pytest.approx(0, abs=0.06)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"digest": "f" * 12, "model": "other"}, "records of one model"),
        ({"rule": LRSAConfig(sink_size=2, lag_size=8, top_k=3, dense_layers=(1,))}, "layers [0, 1, 2] and [0, 2]"),
        ({"lengths": (70,)}, "samples q0, q1 and q0"),
        ({"token_seed": 1}, "sample q0 has other tokens"),
    ],
)
def test_records_that_cannot_be_compared(drawn, changes, reason):
    with refused("selections", reason=reason):
        metrics.agreement_between(drawn(), drawn(**changes))


TOKENS = ["The", " riv", "er", " Isk", " is", " 2", "12", " km", " long", ".", " It", " ends", " in", " Ös", "tra", ",",
          "\n", "River", " mouth", " IS", " \t"]  # fmt: skip
EXPECTED = {
    "number": {" 2", "12"},
    "name": {" Isk", " Ös", "tra", " IS"},
    "rare": {"The", " Isk", " 2", "12", " km", " long", " It", " ends", " in", " Ös", "tra", " mouth"},
    "punctuation": {".", ","},
    "space": {"\n", " \t"},
    "other": {" riv", "er", " is", "River"},
}


def test_kinds_of_tokens_are_those_of_their_words():
    kinds = metrics.token_kinds(TOKENS)
    assert tuple(kinds) == metrics.KINDS
    assert {kind: {TOKENS[i] for i in np.flatnonzero(flags)} for kind, flags in kinds.items()} == EXPECTED


@given(rules(), lengths, st.integers(0, 99))
def test_kinds_kept(drawn, rule, lengths, seed):
    record = drawn(tuple(lengths), rule=rule, seed=seed)
    region = [in_partitions(record, sample) for sample in record.samples]
    votes = [[t for layer in heads_of(record, s) for head in layer for t in head] for s in record.samples]
    flags = [metrics.token_kinds(record.tokens(sample)) for sample in record.samples]
    for kind, of_all, of_kept in zip(metrics.KINDS, *metrics.kinds_kept(record), strict=True):
        member = [set(np.flatnonzero(each[kind])) for each in flags]
        count = sum(t in member[n] for n, tokens in enumerate(region) for t in tokens)
        kept = sum(t in member[n] for n, tokens in enumerate(votes) for t in tokens)
        same(of_all, ratio(count, sum(map(len, region))))
        same(of_kept, ratio(kept, sum(map(len, votes))))
