import random
from collections import Counter
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import pytest
from helpers import refused
from hypothesis import given
from hypothesis import strategies as st

from lrsa_lit.data.order import Mixed, Order, Shuffled
from lrsa_lit.data.plan import EpochPlan, Stage, check_lengths, check_stages, segments
from lrsa_lit.data.policies import FixedSize, Packed, Policy, best_fit_decreasing, checked_policy
from lrsa_lit.data.sampler import EpochSampler

BUDGET = 40
lengths = st.lists(st.integers(1, BUDGET), min_size=1, max_size=60)
policies = st.one_of(
    st.builds(FixedSize, st.integers(1, 5), st.booleans()), st.builds(Packed, st.integers(BUDGET, 2 * BUDGET))
)
epochs = st.integers(0, 5)
ranks = st.integers(1, 4)


def made(
    lengths: Sequence[int], policy: Policy, ranks: int = 1, order: Order | None = None, **options: Any
) -> EpochPlan:
    return EpochPlan(lengths, policy, order or Shuffled(len(lengths)), ranks, **options)


def flat(batches: Sequence[Sequence[int]]) -> list[int]:
    return [position for batch in batches for position in batch]


def within_bounds(policy: Policy, batches: Sequence[Sequence[int]], lengths: Sequence[int]) -> bool:
    if isinstance(policy, Packed):
        return all(batch and sum(lengths[i] for i in batch) <= policy.tokens for batch in batches)
    return all(1 <= len(batch) <= policy.size for batch in batches)


@given(lengths, policies, st.integers(0, 3), epochs)
def test_each_example_comes_once_an_epoch(lengths: list[int], policy: Policy, seed: int, epoch: int):
    plan = made(lengths, policy)
    batches = plan.batches(seed, epoch)
    assert len(batches) == len(plan)
    assert sorted(flat(batches)) == list(range(len(lengths)))
    assert within_bounds(policy, batches, lengths)


@given(lengths, policies, ranks, epochs)
def test_ranks_get_as_many_batches_and_share_nothing(lengths: list[int], policy: Policy, ranks: int, epoch: int):
    if len(lengths) < ranks:
        return
    plan = made(lengths, policy, ranks)
    own = [EpochSampler(plan, 0, rank).batches(epoch) for rank in range(ranks)]
    assert {len(batches) for batches in own} == {len(plan) // ranks}
    seen = [position for batches in own for position in flat(batches)]
    assert len(seen) == len(set(seen)) > len(lengths) - ranks
    assert len(seen) == len(lengths) or all(len(batch) == 1 for batches in own for batch in batches)
    assert all(within_bounds(policy, batches, lengths) for batches in own)


def test_what_is_left_out_for_even_shares_differs_by_epoch():
    plan = made([3, 1, 2, 9, 4], FixedSize(1, by_length=True), ranks=2)
    left_out = {next(iter(set(range(5)) - set(flat(plan.batches(0, epoch))))) for epoch in range(40)}
    assert left_out == set(range(5))


@pytest.mark.parametrize("policy", [FixedSize(2), FixedSize(2, by_length=True), Packed(BUDGET)], ids=str)
def test_the_order_is_decided_by_seed_and_epoch_alone(policy: Policy):
    lengths = [1 + i % BUDGET for i in range(90)]
    plan = made(lengths, policy)
    plan.batches(9, 9)
    assert plan.batches(1, 4) == made(lengths, policy).batches(1, 4)
    assert len({str(plan.batches(seed, epoch)) for seed in range(2) for epoch in range(2)}) == 4


def test_fewer_examples_than_devices_are_refused():
    with refused("devices", 4, "3 training examples"):
        made([1, 1, 1], FixedSize(1), 4)


def test_grouping_puts_similar_lengths_into_a_batch_and_a_step():
    rng = random.Random(0)
    lengths = [rng.randrange(1, 1000) for _ in range(400)]
    plain, grouped = (made(lengths, FixedSize(4, by_length)) for by_length in (False, True))
    assert plain.padding(0, 0) > 0.3
    assert grouped.padding(0, 0) < 0.02
    first = [max(lengths[i] for i in batch) for batch in grouped.batches(0, 0)]
    assert first != sorted(first)
    assert first != sorted(first, reverse=True)
    batches = made(lengths, FixedSize(4, by_length=True), ranks=2).batches(0, 0)
    steps = [
        [max(lengths[i] for i in batch) for batch in pair] for pair in zip(batches[::2], batches[1::2], strict=True)
    ]
    assert max(abs(one - other) for one, other in steps) < 100


def test_padding_is_the_share_of_tokens_that_are_none():
    assert FixedSize(2).padding([[0, 1], [2]], [1, 3, 5]) == pytest.approx(1 - 9 / 11)
    assert FixedSize(2, to_longest=True).padding([[0, 1], [2]], [1, 3, 65]) == pytest.approx(1 - 69 / (3 * 128))
    assert Packed(8).padding([[0, 1], [2]], [1, 3, 5]) == pytest.approx(1 - 9 / 16)


def test_packing_wastes_little():
    rng = random.Random(0)
    lengths = [rng.randrange(200, 4000) for _ in range(2000)]
    plan = made(lengths, Packed(8192))
    assert all(plan.padding(0, epoch) < 0.02 for epoch in range(3))
    assert len(set(plan.batches(0, 0)[0]) & set(plan.batches(0, 1)[0])) < 2


def test_packing_by_hand():
    lengths = [5, 4, 3, 3, 3, 2]
    assert best_fit_decreasing([5, 4, 3, 2, 1, 0], lengths, 10) == [[0, 1], [4, 3, 2], [5]]
    assert best_fit_decreasing(range(3), [6, 4, 7], 10) == [[2], [0, 1]]


@given(lengths, st.integers(BUDGET, 99))
def test_how_many_bins_there_are_depends_on_the_lengths_alone(lengths: list[int], budget: int):
    order = list(range(len(lengths)))
    counts = set()
    for seed in range(4):
        random.Random(seed).shuffle(order)
        counts.add(len(best_fit_decreasing(order, lengths, budget)))
    assert len(counts) == 1


def test_a_budget_below_the_longest_example_is_refused():
    with refused("packing.tokens", 30, "31 or more"):
        Packed(30).check([10, 31, 12])
    Packed(31).check([10, 31, 12])


@pytest.mark.parametrize(
    ("settings", "field", "value"),
    [
        ((1, Packed(0), False), "packing.tokens", 0),
        ((2, Packed(9), False), "batch_size", 2),
        ((1, Packed(9), True), "group_by_length", True),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings: tuple[Any, ...], field: str, value: object):
    with refused(field, value):
        checked_policy(*settings)


@st.composite
def curricula(draw: st.DrawFn) -> tuple[list[int], list[Stage]]:
    """Lengths, and stages that suit them."""
    drawn = draw(lengths)
    bounds = draw(st.lists(st.integers(min(drawn), max(drawn)), max_size=2, unique=True).map(sorted))
    steps = list(accumulate(draw(st.lists(st.integers(1, 30), min_size=len(bounds), max_size=len(bounds)))))
    stages = [Stage(bound, step) for bound, step in zip(bounds, steps, strict=True)]
    return drawn, [*stages, Stage(BUDGET + 1)]


@given(curricula(), policies, ranks, st.integers(1, 3), st.booleans())
def test_no_step_has_an_example_too_long_for_its_stage(
    drawn: tuple[list[int], list[Stage]], policy: Policy, ranks: int, batches_a_step: int, mixed: bool
):
    lengths, stages = drawn
    # Two data sets, of which an epoch has four examples each, however many there are.
    half = len(lengths) // 2
    order = Mixed((half, len(lengths) - half), (4, 4)) if mixed and half else None
    if len(lengths) < ranks:
        return
    plan = made(lengths, policy, ranks, order, curriculum=stages, batches_a_step=batches_a_step)
    step = 0
    for epoch in range(4):
        batches = plan.batches(0, epoch)
        assert len(batches) == len(plan)
        assert within_bounds(policy, batches, lengths)
        for local in range(0, len(plan) // ranks, batches_a_step):
            allowed = next(stage.max_tokens for stage in stages if stage.until_step is None or step < stage.until_step)
            here = batches[local * ranks : (local + batches_a_step) * ranks]
            assert all(lengths[i] <= allowed for i in flat(here))
            step += 1


def test_a_curriculum_puts_long_examples_off_and_drops_none():
    lengths = [10] * 6 + [20] * 6
    plan = made(lengths, FixedSize(2), curriculum=[Stage(10, until_step=2), Stage(20)])
    batches = plan.batches(0, 0)
    assert sorted(flat(batches)) == list(range(12))
    assert {lengths[i] for i in flat(batches[:2])} == {10}
    assert {lengths[i] for i in flat(batches[2:])} == {10, 20}
    assert plan.batches(0, 1) == made(lengths, FixedSize(2), curriculum=[Stage(20)]).batches(0, 1)


def test_short_examples_come_again_while_longer_ones_wait():
    lengths = [10] * 2 + [20] * 6
    plan = made(lengths, FixedSize(1), curriculum=[Stage(10, until_step=12), Stage(20)])
    assert Counter(flat(plan.batches(0, 0))) == {0: 4, 1: 4}
    second = plan.batches(0, 1)
    assert set(flat(second[:4])) == {0, 1}
    assert all(count == 1 for i, count in Counter(flat(second)).items() if lengths[i] == 20)


def test_stages_within_epochs():
    stages = [Stage(10, until_step=3), Stage(20, until_step=4), Stage(30)]
    assert segments(stages, 0, 4, 1) == [(10, 3), (20, 1)]
    assert segments(stages, 1, 4, 1) == [(30, 4)]
    assert segments(stages, 0, 5, 2) == [(10, 5)]
    assert segments(stages, 1, 5, 2) == [(20, 2), (30, 3)]


@pytest.mark.parametrize(
    ("stages", "field", "value", "allowed"),
    [
        ([Stage(5, 3), Stage(9, 7)], "curriculum.1.until_step", 7, "null"),
        ([Stage(5), Stage(9)], "curriculum.0.until_step", None, "1 or more"),
        ([Stage(5, 0), Stage(9)], "curriculum.0.until_step", 0, "1 or more"),
        ([Stage(0, 3), Stage(9)], "curriculum.0.max_tokens", 0, "1 or more"),
        ([Stage(5, 3), Stage(7, 3), Stage(9)], "curriculum.1.until_step", 3, "4 or more"),
        ([Stage(5, 3), Stage(5)], "curriculum.1.max_tokens", 5, "6 or more"),
    ],
)
def test_stages_that_do_not_follow_one_another_are_refused(
    stages: list[Stage], field: str, value: object, allowed: str
):
    with refused(field, value, allowed):
        check_stages(stages)


def test_stages_must_suit_the_lengths():
    check_lengths([], [5])
    check_lengths([Stage(5, 2), Stage(9)], [5, 9])
    with refused("curriculum.0.max_tokens", 4, "5 or more"):
        check_lengths([Stage(4, 2), Stage(9)], [5, 9])
    with refused("curriculum.1.max_tokens", 8, "9 or more"):
        check_lengths([Stage(5, 2), Stage(8)], [5, 9])
