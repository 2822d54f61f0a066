"""Study files: rows as complete settings of fits, and the ordered work of each part.

Settings have the names of ``lrsa fit``. In a row's settings, ``{row: NAME}`` is replaced by the path of the last
checkpoint of another row with the same seed, for example a teacher or the initial weights.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

from lrsa_lit.attention import LRSAConfig
from lrsa_lit.attention.unread import check_read
from lrsa_lit.classes import check_class_paths
from lrsa_lit.errors import UserError, under
from lrsa_lit.evaluation.each_layer import each_layer
from lrsa_lit.experiments.checks import OWN as OWN
from lrsa_lit.experiments.checks import Settings as Settings
from lrsa_lit.experiments.checks import bar_cells, check_study
from lrsa_lit.paths import resolve
from lrsa_lit.yaml_file import read_settings

Made = TypeVar("Made")

DENSE = "dense"
"""Digest of dense attention, which has no rule."""

MIXTURE = "lrsa_lit.data.Mixture"
"""Class of all rows' training data: shares of the study's data sets."""

_DECIDE = ("max_steps", "precision", "gradient_clip_val", "accumulate_grad_batches")
"""Trainer settings that decide the weights and are part of each row's digest."""

# Added later, so they are part of the digest only if they are set: digests of older results stay valid.
_MAY_DECIDE = ("gradient_clip_algorithm",)
_INDIFFERENT = {
    "backbone": {"gradient_checkpointing", "compile_layers"},
    "model": {"backbone", "lrsa", "optimizer", "lr_scheduler", "train_attention", "train_top_k", "evaluate",
              "max_new_tokens", "generate_answers"},
    "data": {"max_tokens", "batch_size", "eval_batch_size", "num_workers", "weights", "data_sets",
             "evaluate_on", "pad_to_longest"},
}  # fmt: skip
"""Settings that do not decide the weights, or are part of the digest under another name."""


class FitSettings(Protocol):
    """Interface of the parser of ``lrsa fit``, which the command line implements."""

    def given(
        self, arguments: Sequence[str], overlays: Sequence[Mapping[str, Any]] = (), *, defaults: bool = False
    ) -> Settings:
        """The settings given by shipped defaults, arguments and overlays; with ``defaults``, all settings of a fit."""

    def made(self, key: str, kind: type[Made], settings: Mapping[str, Any]) -> Made:
        """The object that settings describe; errors start with ``key``."""


@dataclass(frozen=True)
class Row:
    """One training configuration.

    Attributes:
        overlays: the study's settings, and the row's changes to them, including its data sets.
        settings: all ``trainer``, ``model`` and ``data`` settings that are given, with the names of ``lrsa fit``;
            checkpoints of other rows are replaced by the digests of these rows.
        rule: the rule at the start of training; None for dense training.
        needs: the rows whose checkpoints the settings name; they are trained before this one.
        checkpoint: checkpoint of weights that were trained elsewhere. The row then only evaluates them.
    """

    name: str
    overlays: tuple[Settings, Settings]
    settings: Settings
    rule: LRSAConfig | None
    needs: tuple[Row, ...] = ()
    checkpoint: Path | None = None

    @property
    def steps(self) -> int:
        """Number of optimizer steps; 0 for the untrained base LLM."""
        return int(self.settings["trainer"]["max_steps"])

    @property
    def weights(self) -> dict[str, float]:
        """The share of each data set in the training."""
        weights: dict[str, float] = self.settings["data"]["init_args"]["weights"]
        return weights

    @property
    def train_sets(self) -> list[str]:
        """The data sets that its training, and those of the rows that it needs, read; none for the base LLM."""
        own = self.weights if self.steps else ()
        return list(dict.fromkeys([*own, *(name for row in self.needs for name in row.train_sets)]))

    def layers(self, checkpoints: Mapping[str, str]) -> list[Settings]:
        """The overlays with ``{row: NAME}`` replaced; ``checkpoints`` has the path for each row name."""
        return [_filled(overlay, checkpoints.__getitem__) for overlay in self.overlays]

    def trained_by(self) -> Settings:
        """Everything except seed and data that decides the weights; for the base LLM, only backbone and checkpoint."""
        model, trainer, data = (self.settings[name] for name in ("model", "trainer", "data"))
        backbone = _without(model["backbone"], _INDIFFERENT["backbone"])
        if self.steps == 0:
            own = {} if self.checkpoint is None else {"checkpoint": _identity(self.checkpoint)}
            return {"backbone": backbone, "trainer": {"max_steps": 0}} | own
        further = {name: trainer[name] for name in _MAY_DECIDE if trainer.get(name) is not None}
        return {
            "backbone": backbone,
            "trainer": {name: trainer.get(name) for name in _DECIDE} | further,
            "optimizer": model["optimizer"],
            "lr_scheduler": model.get("lr_scheduler"),
            "attention": None if self.rule is None else self.rule.to_dict(),
            "train_top_k": model.get("train_top_k"),
            "data": {"weights": self.weights, "batch_size": data["init_args"].get("batch_size", 1)}
            | _without(data["init_args"], _INDIFFERENT["data"]),
        } | _without(model, _INDIFFERENT["model"])  # fmt: skip

    @property
    def hash(self) -> str:
        """The digest of :meth:`trained_by`."""
        return digest(self.trained_by())


class Evaluation(NamedTuple):
    """One attention (None as rule is dense) on a split of a data set; only losses if ``generates`` is false."""

    name: str
    rule: LRSAConfig | None
    data_set: str
    split: str
    generates: bool

    @property
    def rule_digest(self) -> str:
        """Digest of the rule, or :data:`DENSE`."""
        return digest_of(self.rule)


class Work(NamedTuple):
    """A row with a seed, and its evaluations."""

    row: Row
    seed: int
    evaluations: list[Evaluation]


class Study:
    """A study, read from a local file or one that ships with the project.

    Raises:
        UserError: a key is unknown, or a row or part is inconsistent. Methods also raise it if a name does not exist.
    """

    def __init__(self, name: str, fit_settings: FitSettings) -> None:
        self.name, self.fit_settings = name, fit_settings
        self.title = Path(name).stem
        self._rules: dict[str, LRSAConfig] = {}
        content = read_settings(resolve(name, key="study"))
        check_study(name, content)
        check_class_paths("", content)
        self.seeds: list[int] = content.get("seeds") or [0]
        kinds = "data_sets", "parts", "bars", "plots"
        self.data_sets, self.parts, self.bars, self.plots = (content.get(key) or {} for key in kinds)
        named = {"--plugins": content.get("plugins") or (), "--config": content.get("configs") or ()}
        self.arguments = [part for option, names in named.items() for name in names for part in (option, name)]
        self.overlay: Settings = {key: content[key] for key in ("trainer", "model", "data") if key in content}
        self.common = self._given("", self.overlay, {"data": self._data("", {"init_args": {"weights": {}}})})
        rows: dict[str, Settings | None] = content.get("rows") or {}
        made: dict[str, Row] = {}
        for row in rows:
            self._add(row, rows, made)
        # Rows that others need were made first; restore the order of the file.
        self.rows: dict[str, Row] = {row: made[row] for row in rows}
        self.inference = {
            attention: None if changes is None else self.rule(f"inference.{attention}", changes)
            for attention, changes in each_layer("inference", content.get("inference") or {})
        }
        # Listing all work reports unknown names of every part now, not when the part runs.
        in_parts = {work.row.name for work in self.work(*self.parts)}
        for name, bar in self.bars.items():
            self._check_set(f"bars.{name}", bar["set"])
            for cell in bar_cells(bar):
                self._check_cell(f"bars.{name}", *cell)
                if cell[0] not in in_parts:
                    raise UserError(
                        self.name, reason=f"bars.{name}: no part trains row {cell[0]!r}, so the bar cannot be reached"
                    )
        for name, plot in self.plots.items():
            for row, attention, *data_set in (cell for line in plot["lines"].values() for cell in line if cell):
                self._check_set(f"plots.{name}", *data_set or [plot["set"]])
                self._check_cell(f"plots.{name}", row, attention)

    def row(self, name: str) -> Row:
        """A row by its name."""
        if name not in self.rows:
            raise UserError(self.name, reason=f"there is no row {name!r}; rows are {', '.join(self.rows)}")
        return self.rows[name]

    def work(self, *parts: str) -> list[Work]:
        """The rows of each part with each of its seeds: all rows with the first seed, then with the next one.

        Evaluations that several parts ask of the same row and seed are merged into the first one, without duplicates.
        """
        found: dict[tuple[str, int], Work] = {}
        for part in parts:
            if part not in self.parts:
                raise UserError("--part", part, reason=f"is not allowed; {self.name} has {', '.join(self.parts)}")
            asked = self.parts[part]
            rows = [self.row(name) for name in asked["rows"]]
            if (against := asked.get("against")) is not None:
                self.rule_of(self.row(against["row"]), against["inference"], f"parts.{part}.against.inference")
            for number, seed in enumerate(asked.get("seeds") or self.seeds):
                # The base LLM is the same for each seed.
                for row in rows if number == 0 else [row for row in rows if row.steps]:
                    key = row.name, seed if row.steps else 0
                    before = found[key].evaluations if key in found else []
                    found[key] = Work(row, key[1], _once([*before, *self.evaluations(part, row)]))
        return list(found.values())

    def rule_of(self, row: Row, attention: str, where: str = "inference") -> LRSAConfig | None:
        """The rule of an inference attention, or of the row's own; None is dense. Errors name ``where``."""
        if attention != OWN and attention not in self.inference:
            raise UserError(where, reason=f"there is no {attention!r} in inference")
        return row.rule if attention == OWN else self.inference[attention]

    def generates(self, data_set: str, part: str | None = None) -> bool:
        """Whether answers are generated for a data set (in a part, if given); otherwise only losses are computed."""
        asked = [self.data_sets[data_set], *([self.parts[part]] if part else [])]
        return all(settings.get("generate", True) for settings in asked)

    def new_tokens(self, data_set: str, settings: Settings) -> int:
        """Maximum tokens of an answer: the data set's own limit, or that of a row's settings; 0 for the default."""
        return int(self.data_sets[data_set].get("max_new_tokens") or settings["model"].get("max_new_tokens") or 0)

    def named(self, patterns: Sequence[str]) -> list[str]:
        """The names of inference attentions that match patterns with ``*`` as wildcard, once each, in their order."""
        found = (name for pattern in patterns for name in fnmatch.filter(self.inference, pattern) or [pattern])
        return list(dict.fromkeys(found))

    def rule(self, key: str, changes: Mapping[str, Any]) -> LRSAConfig:
        """The rule of ``model.lrsa`` with changes; errors name ``key``."""
        common = self.common["model"]["lrsa"]
        with under(f"{self.name}: {key}"):
            check_read(changes, common.get("system"))
        # A changed top_k applies to all heads.
        settings = {**common, **({"head_top_k": None} if "top_k" in changes else {}), **changes}
        name = digest(settings)
        if name not in self._rules:
            self._rules[name] = self.fit_settings.made(f"{self.name}: {key}", LRSAConfig, settings)
        return self._rules[name]

    def data_set(self, name: str) -> Settings:
        """The class and arguments of a data set."""
        given = self.data_sets[name]
        return {"class_path": given["class_path"], "init_args": given.get("init_args") or {}}

    def as_config(self, name: str, seed: int) -> Settings:
        """A row as the content of a file for ``lrsa fit --config``, relative to the shipped defaults.

        Checkpoints of other rows appear as ``NAME.ckpt``.
        """
        row = self.row(name)
        settings = self._given("", *row.layers({other.name: f"{other.name}.ckpt" for other in row.needs}))
        own = {key for overlay in row.overlays for key in overlay.get("trainer", {})}
        trainer = {key: value for key, value in settings["trainer"].items() if key in own}
        model = _without(settings["model"], {"evaluate"})
        if changes := model.get("train_attention"):
            # The fit then also validates with this rule.
            model |= {"lrsa": {**model["lrsa"], **changes}, "train_attention": {}}
        return {"seed_everything": seed, "trainer": trainer, "model": model, "data": settings["data"]}

    def evaluations(self, part: str, row: Row) -> list[Evaluation]:
        """The evaluations that a part asks of a row; an attention with several names is evaluated once."""
        asked = self.parts[part]
        if unknown := [name for name in asked["sets"] if name not in self.data_sets]:
            raise UserError(f"parts.{part}.sets", reason=f"there is no data set {unknown[0]!r} in data_sets")
        found = []
        for data_set in asked["sets"]:
            generates = self.generates(data_set, part)
            for name in self.named(asked["inference"]):
                rule = self.rule_of(row, name, f"parts.{part}.inference")
                found.append(Evaluation(name, rule, data_set, asked.get("split", "test"), generates))
        return _once(found)

    def _check_set(self, where: str, data_set: str) -> None:
        if data_set not in self.data_sets:
            raise UserError(f"{self.name}: {where}.set", data_set, "one of data_sets")

    def _check_cell(self, where: str, row: str, attention: str) -> None:
        self.rule_of(self.row(row), attention, f"{self.name}: {where}")

    def _add(self, name: str, rows: Mapping[str, Settings | None], made: dict[str, Row], *above: str) -> Row:
        """Make a row, after the rows that it needs, unless it exists; ``above`` are the rows that need it."""
        if name in made:
            return made[name]
        asking = f"rows.{(*above, name)[0]}"
        if name not in rows:
            raise UserError(self.name, reason=f"{asking}: there is no row {name!r}; rows are {', '.join(rows)}")
        if name in above:
            raise UserError(self.name, reason=f"{asking} needs itself: {' needs '.join((*above, name))}")
        needs: dict[str, Row] = {}

        def digest_of_row(other: str) -> str:
            needs[other] = found = self._add(other, rows, made, *above, name)
            if found.steps == 0:
                raise UserError(self.name, reason=f"rows.{name}: row {other!r} trains nothing; name its model instead")
            return f"row {found.hash}"

        changes = dict(rows[name] or {})
        checkpoint = changes.pop("checkpoint", None)
        overlays = self.overlay, changes | {"data": self._data(name, changes.get("data") or {})}
        given = self._given(f"rows.{name}: ", *(_filled(overlay, digest_of_row) for overlay in overlays))
        for part, read in (("head_gates", "rows take the file that it writes"), ("digests", "`lrsa test` reads them")):
            if given["model"].get(part) is not None:
                reason = f"rows train weights; `lrsa fit` trains {part}, and {read}"
                raise UserError(self.name, reason=f"rows.{name}.model.{part}: {reason}")
        if given["trainer"]["max_steps"] and not given["data"]["init_args"]["weights"]:
            raise UserError(self.name, reason=f"rows.{name}.data.init_args.weights: nothing is left to train on")
        if checkpoint is not None:
            if given["trainer"]["max_steps"]:
                raise UserError(self.name, reason=f"rows.{name}.checkpoint: it is not allowed unless max_steps is 0")
            checkpoint = Path(checkpoint)
            if not checkpoint.exists():
                raise UserError(self.name, reason=f"rows.{name}.checkpoint: {checkpoint} does not exist")
        attention = given["model"].get("train_attention", {})
        rule = None if attention is None else self.rule(f"rows.{name}.model.train_attention", attention)
        made[name] = Row(name, overlays, given, rule, tuple(needs.values()), checkpoint)
        return made[name]

    def _data(self, row: str, changes: Settings) -> Settings:
        """A row's data, with only the data sets that have a share; a row can exclude a data set by a share of 0."""
        below = self.overlay.get("data", {})
        if (kind := {**below, **changes}.get("class_path", MIXTURE)) != MIXTURE:
            raise UserError(self.name, reason=f"data.class_path: {kind!r} is not allowed; rows train on a {MIXTURE}")
        arguments: list[Settings] = [data.get("init_args") or {} for data in (below, changes)]
        shares = {name: share for each in arguments for name, share in (each.get("weights") or {}).items()}
        if unknown := [name for name in shares if name not in self.data_sets]:
            raise UserError(self.name, reason=f"rows.{row}: data_sets has no {unknown[0]!r}")
        weights = {name: share for name, share in shares.items() if share}
        named = {name: self.data_set(name) for name in weights}
        # The parts decide what is evaluated, so the fit evaluates nothing.
        own = {"weights": weights, "data_sets": named, "evaluate_on": []}
        return {**changes, "class_path": MIXTURE, "init_args": {**arguments[1], **own}}

    def _given(self, where: str, *overlays: Settings) -> Settings:
        try:
            given = self.fit_settings.given(self.arguments, overlays)
        except UserError as error:
            raise UserError(self.name, reason=f"{where}{error}") from None
        if given["model"].get("lrsa") is None:
            raise UserError(f"{self.name}: {where}model.lrsa", allowed="settings", reason="null is not allowed")
        return given


def _identity(checkpoint: Path) -> list[Any]:
    """Path, size and modification time, which identify a checkpoint without reading it."""
    about = checkpoint.stat()
    return [str(checkpoint.resolve()), about.st_size, about.st_mtime_ns]


def _filled(settings: Any, checkpoint: Callable[[str], str]) -> Any:
    """Settings with each ``{row: NAME}`` replaced by ``checkpoint(NAME)``."""
    if isinstance(settings, dict):
        if settings.keys() == {"row"} and isinstance(settings["row"], str):
            return checkpoint(settings["row"])
        return {key: _filled(value, checkpoint) for key, value in settings.items()}
    return [_filled(value, checkpoint) for value in settings] if isinstance(settings, list) else settings


def digest(values: Any) -> str:
    """Digest of plain values, independent of the order of keys: twelve hex digits."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]


def digest_of(rule: LRSAConfig | None) -> str:
    """Digest of a rule, or :data:`DENSE`."""
    return DENSE if rule is None else rule.digest()


def _once(evaluations: Sequence[Evaluation]) -> list[Evaluation]:
    """Drop duplicates; for the same questions, an evaluation with answers replaces one with only losses."""
    found: dict[tuple[str, str, str], Evaluation] = {}
    for item in evaluations:
        key = item.rule_digest, item.data_set, item.split
        if key not in found or item.generates > found[key].generates:
            found[key] = item
    return list(found.values())


def _without(settings: Mapping[str, Any], names: set[str]) -> Settings:
    return {name: value for name, value in settings.items() if name not in names}
