"""Splits that share nothing: items that have a key in common stay together."""

from __future__ import annotations

import random
from collections.abc import Hashable, Sequence

from lrsa_lit.errors import UserError


def check_fractions(val_fraction: float, test_fraction: float) -> None:
    """Refuse fractions that are negative or leave nothing to train on.

    Raises:
        UserError: they do.
    """
    for name, value in (("val_fraction", val_fraction), ("test_fraction", test_fraction)):
        if not 0 <= value < 1:
            raise UserError(name, value, "0 or more and less than 1")
    if val_fraction + test_fraction >= 1:
        both = (val_fraction, test_fraction)
        raise UserError("val_fraction", both, "less than 1 together with test_fraction")


def disjoint_splits(
    keys: Sequence[Sequence[Hashable]], val_fraction: float, test_fraction: float, seed: int
) -> dict[str, list[int]]:
    """Deal items out to train, val and test so that no key occurs in two of them.

    Items connected by shared keys form a group (union-find); shuffled groups fill test, then val, each until it has
    its fraction of the items, and the rest is train.

    Args:
        keys: of each item, at least one.
        val_fraction: of the items; exceeded by less than a group.
        test_fraction: of the items; exceeded by less than a group.
        seed: of the shuffle.

    Returns:
        Positions in ``keys``, shuffled by group, per split.
    """
    groups = _groups(keys)
    random.Random(seed).shuffle(groups)
    splits: dict[str, list[int]] = {"train": [], "val": [], "test": []}
    for group in groups:
        if len(splits["test"]) < test_fraction * len(keys):
            splits["test"] += group
        elif len(splits["val"]) < val_fraction * len(keys):
            splits["val"] += group
        else:
            splits["train"] += group
    return splits


def _groups(keys: Sequence[Sequence[Hashable]]) -> list[list[int]]:
    parent = {key: key for item in keys for key in item}

    def root(key: Hashable) -> Hashable:
        while parent[key] != key:
            parent[key] = parent[parent[key]]  # halving the path keeps later look-ups short
            key = parent[key]
        return key

    for first, *others in keys:
        for other in others:
            parent[root(other)] = root(first)
    groups: dict[Hashable, list[int]] = {}
    for position, (first, *_) in enumerate(keys):
        groups.setdefault(root(first), []).append(position)
    return list(groups.values())
