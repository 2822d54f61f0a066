"""Checks before the first training of a study, for mistakes that would otherwise fail in the middle."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from lrsa_lit.attention import cache_share
from lrsa_lit.attention.budgets import heads_of
from lrsa_lit.errors import UserError, under
from lrsa_lit.experiments.checks import bar_rows
from lrsa_lit.experiments.study import Row, Settings, Study, Work, digest

if TYPE_CHECKING:
    from lrsa_lit.models import Backbone

_HALF_A_PERCENT = 0.005
"""The tolerance that bars also have."""


def check(study: Study, works: Iterable[Work], settings_of: Callable[[Row], Settings]) -> None:
    """Check the settings of the planned work, and the whole study against the limits of its models.

    Args:
        study: the study. The lengths of all its data sets are checked against the models' positions, and the cache
            shares of all its bars against what their rows can hold.
        works: the planned work.
        settings_of: returns the settings of a row's commands on this machine.

    Raises:
        UserError: the first mistake that is found.
    """
    from lrsa_lit.data.module import QADataModule

    models = _Models(study, settings_of)
    lengths = {name: study.fit_settings.made(f"data_sets.{name}", QADataModule, study.data_set(name)).max_tokens
               for name in study.data_sets}  # fmt: skip
    for work in works:
        _check_work(study, work, settings_of(work.row), models.of(work.row))
    for work in study.work(*study.parts):
        for row in (work.row, *work.row.needs):
            models.check_training(row)
        for name in dict.fromkeys(item.data_set for item in work.evaluations):
            models.check_data_set(work.row, name, lengths[name])
    for name, bar in study.bars.items():
        for row in map(study.row, bar_rows(bar) if "cache" in bar else []):
            models.check_cache(f"bars.{name}.cache", bar, row, lengths[bar["set"]])


class _Models:
    """The models of the rows; each backbone is made once."""

    def __init__(self, study: Study, settings_of: Callable[[Row], Settings]) -> None:
        from lrsa_lit.tasks import LongContextQA

        self.study, self.settings_of = study, settings_of
        # The default of a fit.
        self._new_tokens: int = inspect.signature(LongContextQA).parameters["max_new_tokens"].default
        self._backbones: dict[str, Backbone] = {}

    def of(self, row: Row) -> Any:
        return self._backbone(row).config

    def check_training(self, row: Row) -> None:
        """Check that a row's rule suits its model, and that the training examples fit the model's positions."""
        from lrsa_lit.tasks.attentions import of_system

        if row.rule is not None:
            with under(f"rows.{row.name}.model.train_attention"), of_system(row.rule):
                row.rule.layers.check(self.of(row).num_hidden_layers, heads_of(self.of(row)))
        if row.steps:
            settings = self.settings_of(row)
            tokens = settings["data"]["init_args"]["max_tokens"]
            new = settings["model"].get("max_new_tokens", self._new_tokens)
            self._check_positions(f"rows.{row.name}.data.init_args.max_tokens", row, tokens, new)

    def check_data_set(self, row: Row, data_set: str, tokens: int) -> None:
        """Check that the examples of an evaluation, with answers, fit the model's positions."""
        new = self.study.new_tokens(data_set, self.settings_of(row)) or self._new_tokens
        self._check_positions(f"data_sets.{data_set}.init_args.max_tokens", row, tokens, new)

    def _check_positions(self, where: str, row: Row, tokens: int, new: int) -> None:
        positions = getattr(self.of(row), "max_position_embeddings", None) or sys.maxsize
        if tokens + new > positions:
            reason = f"the model of row {row.name} has {positions} positions, and an answer takes {new} of them"
            raise UserError(where, tokens, f"at most {positions - new}", hint=reason)

    def check_cache(self, where: str, bar: Settings, row: Row, tokens: int) -> None:
        """Check that a row named by a bar can hold as little of a dense cache as the bar allows."""
        rule, backbone = self.study.rule_of(row, bar["inference"]), self._backbone(row)
        layers = backbone.config.num_hidden_layers
        share = 1.0 if rule is None else cache_share(rule, tokens, layers, backbone.head)
        if share > bar["cache"] + _HALF_A_PERCENT:
            holds = f"which row {row.name} holds under {bar['inference']} of {tokens} tokens"
            raise UserError(where, bar["cache"], f"at least {share:.3f}, {holds}")

    def _backbone(self, row: Row) -> Backbone:
        from lrsa_lit.models import Backbone

        settings = self.settings_of(row)["model"]["backbone"]
        key = digest(settings)
        if key not in self._backbones:
            made = self.study.fit_settings.made
            self._backbones[key] = made(f"rows.{row.name}.model.backbone", Backbone, settings)
            with under(f"rows.{row.name}.model.backbone"):
                self._backbones[key].check_low_rank()
        return self._backbones[key]


def _check_work(study: Study, work: Work, settings: Settings, model: Any) -> None:
    from lrsa_lit.data.module import QADataModule
    from lrsa_lit.objectives import Objective

    made, row, layers = study.fit_settings.made, work.row, model.num_hidden_layers
    if row.steps:
        made(f"rows.{row.name}.data", QADataModule, settings["data"])
        if (objective := settings["model"].get("objective")) is not None:
            with under(f"rows.{row.name}.model.objective"):
                made("", Objective, objective).check(settings["data"]["init_args"]["max_tokens"], layers)  # type: ignore[type-abstract]
    for item in work.evaluations:
        if item.rule is not None:
            with under(f"inference.{item.name}"):
                item.rule.layers.check(layers, heads_of(model))
