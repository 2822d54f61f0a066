"""A mixture of several data sets, each with its share of the training."""

from __future__ import annotations

import inspect
from functools import cached_property
from typing import Any

import datasets

from lrsa_lit.data import fingerprint
from lrsa_lit.data.module import BATCHED, SPLITS, QADataModule, Score, Split, at_least
from lrsa_lit.data.order import Mixed, Order, shares
from lrsa_lit.errors import UserError


class Mixture(QADataModule):
    """Trains on weighted shares of several data sets, and evaluates on all or some of them.

    The weights hold in every epoch: each data set is iterated at its own pace, in a new order each time. With packing,
    every epoch has the same number of sequences, and the few examples that do not fit into them are left out.

    Args:
        data_sets: the data sets by name, each with a class_path. The mixture's settings decide how batches are made.
        weights: relative share of each data set; 0 for a data set that is only evaluated on.
        examples_per_epoch: number of examples per epoch; null for the total of all data sets with a positive weight.
        evaluate_on: names of the data sets for validation and test; null for all. Batches hold the name for each row.
        kwargs: tokenizer (passed to all data sets), max_tokens (which no data set may exceed), and QADataModule's
            settings of batches.

    Raises:
        UserError: a parameter is out of range, or a data set's parameter contradicts the mixture's.
    """

    def __init__(
        self,
        data_sets: dict[str, QADataModule],
        weights: dict[str, float],
        examples_per_epoch: int | None = None,
        evaluate_on: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        # Each data set has these three itself, so a mixture does not accept them.
        super().__init__(seed=0, limit=None, filter=None, **kwargs)
        self.data_sets = data_sets
        self.weights = weights
        self.examples_per_epoch = examples_per_epoch
        self.evaluate_on = list(data_sets) if evaluate_on is None else evaluate_on
        self._check()
        for data_set in data_sets.values():
            data_set.tokenizer = self.tokenizer
        self._counts: list[int] = []

    @cached_property
    def fingerprint(self) -> str:
        """Identifier of the examples of all data sets."""
        parts = {name: data_set.fingerprint for name, data_set in self.data_sets.items()}
        return f"{type(self).__name__}-{fingerprint.digest({'data_sets': parts, 'evaluate_on': self.evaluate_on})}"

    @property
    def training_fingerprint(self) -> str:
        """Identifier of the examples of the data sets with a positive weight."""
        parts = [(name, self.data_sets[name].fingerprint) for name in self._serving("train")]
        return f"{type(self).__name__}-{fingerprint.digest({'train': parts})}"

    def sources(self) -> dict[str, str]:
        """The sources of all data sets, prefixed by their names."""
        return {
            f"{name}.{source}": value
            for name, data_set in self.data_sets.items()
            for source, value in data_set.sources().items()
        }

    def splits(self) -> tuple[Split, ...]:
        """The splits that at least one data set has."""
        return tuple(split for split in SPLITS if self._serving(split))

    def prepare_split(self, split: Split) -> None:
        """Tokenise and cache a split in each data set that contributes to it."""
        for name in self._serving(split):
            self.data_sets[name].prepare_split(split)

    def open_split(self, split: Split) -> datasets.Dataset:
        """The concatenated examples of a split's data sets; the column ``source`` holds the data set's name."""
        opened = {name: self.data_sets[name].open_split(split) for name in self._serving(split)}
        for name in opened:
            for count, value in self.data_sets[name].report[split].items():
                self.report[split][f"{name}/{count}"] = value
        if split == "train":
            self._counts = [len(examples) for examples in opened.values()]
        return datasets.concatenate_datasets(
            [examples.add_column("source", [name] * len(examples)) for name, examples in opened.items()]
        )

    def order(self, examples: int) -> Order:
        """The order of an epoch: weighted shares of the data sets, shuffled together."""
        names = self._serving("train")
        quotas = shares([self.weights[name] for name in names], self.examples_per_epoch or examples)
        for name, quota in zip(names, quotas, strict=True):
            if not quota:
                reason = f"is less than one example of an epoch of {sum(quotas)}"
                allowed = "0 or larger; or make examples_per_epoch larger"
                raise UserError(f"weights.{name}", self.weights[name], allowed, reason=reason)
        return Mixed(tuple(self._counts), quotas)

    def check_answers(self, command: str) -> None:
        """Check each data set that is evaluated on."""
        for name in self.evaluate_on:
            self.data_sets[name].check_answers(command)

    def score_of(self, group: str) -> Score:
        """The published metric of the group's data set; F1 for the whole mixture."""
        name = group.partition("/")[0]
        return self.data_sets[name].score if name else self.score

    def _serving(self, split: Split) -> list[str]:
        """Names of the data sets that contribute to a split."""
        if split == "train":
            return [name for name in self.data_sets if self.weights[name]]
        return [name for name in self.evaluate_on if split in self.data_sets[name].splits()]

    def _check(self) -> None:
        names = ", ".join(self.data_sets)
        for key, given in (("weights", self.weights), ("evaluate_on", self.evaluate_on)):
            if unknown := [name for name in given if name not in self.data_sets]:
                raise UserError(key, unknown[0], f"one of data_sets: {names}")
        if missing := [name for name in self.data_sets if name not in self.weights]:
            raise UserError(f"weights.{missing[0]}", reason="is missing", hint=f"give a weight to each of {names}")
        for name, weight in self.weights.items():
            if not 0 <= weight < float("inf"):
                raise UserError(f"weights.{name}", weight, "0 or more")
        if not any(self.weights.values()):
            raise UserError("weights", self.weights, "above 0 for at least one data set")
        if self.examples_per_epoch is not None:
            at_least("examples_per_epoch", self.examples_per_epoch, 1)
        for name, data_set in self.data_sets.items():
            self._check_data_set(name, data_set)

    def _check_data_set(self, name: str, data_set: QADataModule) -> None:
        key = f"data_sets.{name}"
        if isinstance(data_set, Mixture):
            raise UserError(key, reason="is a Mixture", allowed="another data set")
        if data_set.max_tokens > self.max_tokens:
            allowed = f"{self.max_tokens} (the mixture's max_tokens) or less"
            raise UserError(f"{key}.max_tokens", data_set.max_tokens, allowed)
        if self.packing is not None and data_set.rejects:
            reason = f"is not allowed, as {name} has pairs"
            raise UserError("packing", self.packing.tokens, "null", reason=reason)
        if self.weights[name] and "train" not in data_set.splits():
            raise UserError(f"weights.{name}", self.weights[name], "0, as it has no training split")
        defaults = inspect.signature(QADataModule.__init__).parameters
        for setting in sorted(BATCHED):
            value = getattr(data_set, setting) or defaults[setting].default
            if value != defaults[setting].default:
                raise UserError(f"{key}.{setting}", value, f"set only for the mixture, as {setting}")
