"""Who holds which tokens of a shared row, who compresses what, and what is exchanged: properties of integers."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from objective_helpers import example

from lrsa_lit.attention import LRSAConfig
from lrsa_lit.context_parallel import Shares, shortest_row
from lrsa_lit.context_parallel.share_plan import Plan
from lrsa_lit.data.collate import collate_packed
from lrsa_lit.errors import UserError
from lrsa_lit.objectives.positions import Positions
from lrsa_lit.ops.sparse_attention import Rule, compressed_at, raw_start
from lrsa_lit.tasks.shared_batch import inputs_of, long_enough, shared_rows

RULES = st.builds(
    Rule, sink_size=st.integers(0, 9), lag_size=st.integers(2, 8), top_k=st.integers(0, 2),
    chunk_size=st.none() | st.integers(1, 20),
)  # fmt: skip
ROWS = st.lists(st.integers(1, 90), min_size=1, max_size=9)


@st.composite
def shared(draw):
    """A rule, and the shares of a row that is long enough for it."""
    rule, lengths, ranks = draw(RULES), draw(ROWS), draw(st.integers(2, 5))
    assume(sum(lengths) >= shortest_row(ranks, rule))
    return rule, Shares.cut([0, *itertools.accumulate(lengths)], ranks, rule)


@given(shared())
def test_each_token_is_held_once_and_no_partition_is_cut(drawn):
    rule, shares = drawn
    spans = [span for rank in range(shares.ranks) for span in shares.spans(rank)]
    assert all(start < stop for start, stop in spans)
    assert sorted(spans) == list(itertools.pairwise(shares.cuts))
    ends = set(shares.boundaries)
    for start, stop in itertools.pairwise(shares.boundaries):
        ends |= set(range(start + rule.sink_size, stop, rule.lag_size))
    assert set(shares.cuts) <= ends
    # About equally many tokens, from the front and from the back.
    off = [cut - number * shares.cuts[-1] / (2 * shares.ranks) for number, cut in enumerate(shares.cuts)]
    assert max(map(abs, off)) <= max(rule.lag_size, rule.sink_size) / 2


@given(shared())
def test_each_rank_knows_its_tokens(drawn):
    _, shares = drawn
    length = shares.cuts[-1]
    positions = np.concatenate([np.arange(stop - start) for start, stop in itertools.pairwise(shares.boundaries)])
    places = np.arange(3 * length)
    counts = np.zeros(3 * length)
    for rank in range(shares.ranks):
        mine = np.concatenate([np.arange(start, stop) for start, stop in shares.spans(rank)])
        assert (shares.positions(rank) == positions[mine]).all()
        held, own = shares.held(places, rank)
        counts += held
        rows, columns = np.divmod(own, len(mine))
        assert (rows * length + mine[columns] == places[held]).all()
    assert (counts == 1).all()


@given(shared())
def test_each_partition_is_compressed_once_by_who_holds_its_reference(drawn):
    rule, shares = drawn
    plan = Plan(shares, rule)
    found = {}
    for pieces in plan.pieces:
        for piece in pieces:
            for partition in range(piece.first, piece.first + piece.compresses):
                reference = rule.sink_size + (partition + 1) * rule.lag_size
                assert piece.start <= reference <= reference + rule.lag_size <= piece.stop
                assert piece.raw_from <= reference - rule.lag_size
                found.setdefault(piece.sequence, []).append(partition)
    for number, (start, stop) in enumerate(itertools.pairwise(shares.boundaries)):
        assert found.get(number, []) == list(range(compressed_at(stop - start - 1, rule)))


@given(shared())
def test_halos_hold_what_the_first_query_sees_and_no_more(drawn):
    rule, shares = drawn
    plan = Plan(shares, rule)
    for pieces, (start, stop) in zip(plan.pieces, plan.halos, strict=True):
        first = pieces[0]
        assert first.raw_from == raw_start(compressed_at(first.start, rule), rule)
        assert stop - start == first.start - first.raw_from
        assert stop - start < max(2 * rule.lag_size + rule.chunk, rule.first_compression + 1)
    for share, (start, stop) in enumerate(plan.halos):
        moved = sorted((move.start, move.stop) for move in plan.moves if move.share == share)
        assert [place for span in moved for place in range(*span)] == list(range(start, stop))


@given(shared())
def test_the_compact_rows_of_a_sequence_follow_each_other(drawn):
    rule, shares = drawn
    plan = Plan(shares, rule)
    spans, gather = plan.gather.spans, plan.gather
    for number, pieces in itertools.groupby(itertools.chain(*plan.pieces), key=lambda piece: piece.sequence):
        parts = list(pieces)
        start, stop = spans.get(number, (0, 0))
        total = 0 if plan.is_whole(parts[0]) else parts[0].partitions
        assert stop - start == (rule.sink_size + total * rule.top_k if total else 0)
        assert all(plan.needed(piece) <= stop - start for piece in parts if not plan.is_whole(piece))
    # Each row that a rank gives comes once; that they are in the order of the sequence shows where ranks attend.
    rows = [row for span in gather.order for row in range(*span)]
    assert len(set(rows)) == len(rows)
    assert all(0 <= row < gather.rows * shares.ranks for row in rows)


def test_compact_pairs_are_k_of_l_of_what_a_ring_moves():
    rule = Rule(sink_size=16, lag_size=128, top_k=32)
    length, ranks = 1 << 17, 8
    plan = Plan(Shares.cut([0, length], ranks, rule), rule)
    ring = length * (ranks - 1) / ranks
    for rank in range(ranks):
        halos, compact = plan.received(rank)
        assert halos <= 2 * 3 * rule.lag_size
        assert compact / ring == pytest.approx(rule.top_k / rule.lag_size, rel=0.01)


@pytest.mark.parametrize(("tokens", "ranks"), [(47, 4), (1, 2)])
def test_a_row_of_less_than_two_partitions_for_each_rank_is_refused(tokens, ranks):
    with pytest.raises(UserError, match=f"two partitions each, and one has {tokens}"):
        Shares.cut([0, tokens], ranks, Rule(sink_size=3, lag_size=6, top_k=2))


def test_a_packed_row_that_is_too_short_gets_a_sequence_of_pads():
    config = LRSAConfig(sink_size=2, lag_size=16, top_k=4)
    group = SimpleNamespace(size=lambda: 2, rank=lambda: 1)
    mesh = SimpleNamespace(mesh_dim_names=("data_parallel", "context"), get_group=lambda _: group)
    batch = collate_packed([example(20, 5, "a"), example(10, 2, "b")])
    longer = long_enough(batch, mesh, config)
    assert longer["boundaries"] == [0, 25, 37, 64]
    assert longer["input_ids"].shape == longer["labels"].shape == (1, 64)
    assert longer["input_ids"][:, :37].equal(batch["input_ids"])
    shared = shared_rows(longer, mesh, config)
    inputs = inputs_of(longer, shared)
    assert inputs["input_ids"].shape == inputs["position_ids"].shape
    # Its tokens are those from 18 on.
    assert shared.shares.spans(1) == [(18, 27), (27, 55)]
    assert Positions(longer, 0, 0, shared).answers().tolist() == [each - 18 for each in [19, 20, 21, 22, 23, 34, 35]]
    # Each device has batches of its own, or the row is long enough.
    assert long_enough(batch, None, config) is batch
    assert long_enough(longer, mesh, config) is longer
