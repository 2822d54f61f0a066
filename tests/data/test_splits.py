from itertools import combinations

import pytest
from helpers import refused
from hypothesis import given
from hypothesis import strategies as st

from lrsa_lit.data.splits import check_fractions, disjoint_splits

items = st.lists(st.lists(st.integers(0, 30), min_size=1, max_size=3), min_size=1, max_size=40)


@given(items, st.integers(0, 5))
def test_splits_share_no_key_and_lose_no_item(keys, seed):
    splits = disjoint_splits(keys, 0.2, 0.2, seed)
    assert sorted(position for split in splits.values() for position in split) == list(range(len(keys)))
    held = [{key for position in split for key in keys[position]} for split in splits.values()]
    assert all(first.isdisjoint(second) for first, second in combinations(held, 2))


def test_chains_of_shared_keys_stay_together():
    splits = disjoint_splits([["a", "b"], ["c", "d"], ["b", "c"]], 0.3, 0.3, seed=0)
    assert sorted(map(len, splits.values())) == [0, 0, 3]


def test_fractions_are_kept_where_groups_are_small():
    splits = disjoint_splits([[number] for number in range(1000)], 0.1, 0.2, seed=0)
    assert {name: len(split) for name, split in splits.items()} == {"train": 700, "val": 100, "test": 200}


def test_the_seed_decides():
    keys = [[number] for number in range(100)]
    assert disjoint_splits(keys, 0.1, 0.1, 1) == disjoint_splits(keys, 0.1, 0.1, 1)
    assert disjoint_splits(keys, 0.1, 0.1, 1) != disjoint_splits(keys, 0.1, 0.1, 2)


@pytest.mark.parametrize(
    ("val", "test", "field", "value"),
    [
        (-0.1, 0.1, "val_fraction", -0.1),
        (0.1, 1.0, "test_fraction", 1.0),
        (0.5, 0.5, "val_fraction", (0.5, 0.5)),
    ],
)
def test_impossible_fractions_are_refused(val, test, field, value):
    with refused(field, value):
        check_fractions(val, test)
