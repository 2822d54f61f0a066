"""What a study file asks for: its rows as complete settings, and the work of a part in order."""

from __future__ import annotations

import fnmatch
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from lrsa_lit.attention import LRSAConfig
from lrsa_lit.bounds import is_integer
from lrsa_lit.errors import UserError, under
from lrsa_lit.ops.sparse_attention import Compressor
from lrsa_lit.study import settings
from lrsa_lit.study.checks import TRAINER, check_overlay, check_row, check_study
from lrsa_lit.study.settings import Settings

OWN = "own"
"""The inference attention that a row was trained with."""

DENSE = "dense"
"""The digest of dense attention, which has no rule."""

# How a model is trained, but not what comes out of it.
_NOT_IN_HASH = {"gradient_checkpointing", "compile_layers"}


@dataclass(frozen=True)
class Row:
    """One way to train.

    Attributes:
        name: in the study.
        settings: complete ``trainer``, ``model`` and ``data`` settings, in the words of the command line.
        rule: the rule that training starts from; None for dense training.
    """

    name: str
    settings: Settings
    rule: LRSAConfig | None

    @property
    def steps(self) -> int:
        """Optimizer steps; 0 for the base LLM as it is."""
        return int(self.settings["trainer"]["max_steps"])

    @property
    def weights(self) -> dict[str, float]:
        """The share of each data set in the training; an overlay leaves one of the settings below it out with 0."""
        given = self.settings["data"]["init_args"]["weights"]
        return {name: weight for name, weight in given.items() if weight}

    @property
    def batch_size(self) -> int:
        """Examples in a batch."""
        return int(self.settings["data"]["init_args"]["batch_size"])

    def trained_by(self) -> Settings:
        """All that decides the trained weights beside the seed and the data; nothing for the base LLM."""
        model = self.settings["model"]
        backbone = {name: value for name, value in model["backbone"].items() if name not in _NOT_IN_HASH}
        if self.steps == 0:
            return {"backbone": backbone, "trainer": {"max_steps": 0}}
        return {
            "backbone": backbone,
            "trainer": {name: self.settings["trainer"].get(name) for name in TRAINER},
            "optimizer": model["optimizer"],
            "lr_scheduler": model.get("lr_scheduler"),
            "attention": None if self.rule is None else self.rule.to_dict(),
            "train_top_k": model.get("train_top_k"),
            "data": {"weights": self.weights, "batch_size": self.batch_size},
        }

    @property
    def hash(self) -> str:
        """Twelve hex digits of :meth:`trained_by`, whatever the order of its keys."""
        return digest(self.trained_by())


class Evaluation(NamedTuple):
    """One attention on one data set.

    Attributes:
        name: of the attention in the study.
        rule: None is dense.
        data_set: its name.
        split: its split.
        generates: whether the questions are answered; else there are losses alone.
    """

    name: str
    rule: LRSAConfig | None
    data_set: str
    split: str
    generates: bool

    @property
    def rule_digest(self) -> str:
        """Of the rule, or :data:`DENSE`."""
        return digest_of(self.rule)


class Work(NamedTuple):
    """A row with a seed, and what to evaluate it on."""

    row: Row
    seed: int
    evaluations: list[Evaluation]


class Study:
    """A study file.

    Args:
        name: path of the file, or of a shipped one.

    Raises:
        UserError: unknown keys, or a row or part that does not fit together.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        content = settings.read(name)
        check_study(name, content)
        self.seeds: list[int] = content.get("seeds") or [0]
        self.data_sets: dict[str, Settings] = content.get("data_sets") or {}
        self.parts: dict[str, Settings] = content.get("parts") or {}
        self.bars: dict[str, Settings] = content.get("bars") or {}
        below: Settings = {}
        for file in ("cli.yaml", *(content.get("configs") or ())):
            below = settings.merged(below, settings.read(file))
        own: Settings = {key: content[key] for key in ("trainer", "model", "data") if key in content}
        self._trainer = below.get("trainer", {}).keys()
        check_overlay(f"{name}: ", own, self._trainer)
        self.common = settings.merged(below, own)
        self.rows = {row: self._row(row, changes or {}) for row, changes in (content.get("rows") or {}).items()}
        self.lrsa = _rule("model.lrsa", self.common["model"]["lrsa"], {})
        self.inference = {
            attention: None if changes is None else _rule(f"inference.{attention}", self.lrsa, changes)
            for attention, changes in _each_layer(content.get("inference") or {})
        }
        for part in self.parts:
            # What one names and the study does not have is told now, not when its turn has come.
            list(self._work(part))

    def row(self, name: str) -> Row:
        """A row by its name."""
        if name not in self.rows:
            raise UserError(f"{self.name}: there is no row {name!r}; there are {', '.join(self.rows)}")
        return self.rows[name]

    def work(self, *parts: str) -> list[Work]:
        """The rows of each part with each of its seeds: all rows with the first seed, then with the next one.

        What several parts ask of the same row and seed stands together, where the first of them has it, and each
        evaluation once.

        Raises:
            UserError: there is no such part, or it names what the study does not have.
        """
        found: dict[tuple[str, int], Work] = {}
        for work in (work for part in parts for work in self._work(part)):
            before = found.get((work.row.name, work.seed), Work(work.row, work.seed, []))
            together = _once([*before.evaluations, *work.evaluations])
            found[work.row.name, work.seed] = before._replace(evaluations=together)
        return list(found.values())

    def _work(self, part: str) -> Iterator[Work]:
        """Of one part; the same attention may stand under several names."""
        if part not in self.parts:
            raise UserError(f"--part: {part!r} is not allowed; {self.name} has {', '.join(self.parts)}")
        asked = self.parts[part]
        rows = [self.row(name) for name in asked["rows"]]
        if (against := asked.get("against")) is not None:
            self.rule_of(self.row(against["row"]), against["inference"], f"parts.{part}.against.inference")
        for number, seed in enumerate(asked.get("seeds") or self.seeds):
            for row in rows:
                # The base LLM is the same for each seed.
                if row.steps or number == 0:
                    yield Work(row, seed if row.steps else 0, self._evaluations(part, row))

    def rule_of(self, row: Row, attention: str, where: str = "inference") -> LRSAConfig | None:
        """The rule of an attention, for a row's own as well; None is dense.

        Raises:
            UserError: there is none of that name, which stands at ``where``.
        """
        if attention != OWN and attention not in self.inference:
            raise UserError(f"{where}: there is no {attention!r} in inference")
        return row.rule if attention == OWN else self.inference[attention]

    def generates(self, data_set: str, part: str | None = None) -> bool:
        """Whether the questions of a data set are answered, in a part or at all; else there are losses alone."""
        asked = [self.data_sets[data_set], *([self.parts[part]] if part else [])]
        return all(settings.get("generate", True) for settings in asked)

    def _evaluations(self, part: str, row: Row) -> list[Evaluation]:
        asked = self.parts[part]
        split = asked.get("split", "test")
        evaluations = []
        for data_set in asked["sets"]:
            if data_set not in self.data_sets:
                raise UserError(f"parts.{part}.sets: there is no data set {data_set!r} in data_sets")
            for name in self.named(asked["inference"]):
                rule = self.rule_of(row, name, f"parts.{part}.inference")
                evaluations.append(Evaluation(name, rule, data_set, split, self.generates(data_set, part)))
        return evaluations

    def named(self, patterns: Sequence[str]) -> list[str]:
        """The inference attentions of some names, in which ``*`` stands for anything."""
        return [name for pattern in patterns for name in fnmatch.filter(self.inference, pattern) or [pattern]]

    def _row(self, name: str, changes: Settings) -> Row:
        where = f"{self.name}: rows.{name}."
        check_overlay(where, changes, self._trainer)
        complete = settings.resolved(settings.merged(self.common, changes))
        check_row(where, complete)
        arguments = complete["data"]["init_args"]
        if unknown := [data_set for data_set in arguments["weights"] if data_set not in self.data_sets]:
            raise UserError(f"{self.name}: rows.{name}: data_sets has no {unknown[0]!r}")
        if complete["trainer"]["max_steps"] and not any(arguments["weights"].values()):
            raise UserError(f"{where}data.init_args.weights: {arguments['weights']} leaves nothing to train on")
        attention = complete["model"].get("train_attention", {})
        lrsa = _rule("model.lrsa", complete["model"]["lrsa"], {})
        rule = None if attention is None else _rule(f"rows.{name}.model.train_attention", lrsa, attention)
        return Row(name, complete, rule)

    def as_config(self, name: str, seed: int) -> Settings:
        """A row as a file for ``lrsa fit --config``, over nothing but the shipped defaults."""
        row = self.row(name)
        model = {key: value for key, value in row.settings["model"].items() if key != "evaluate"}
        if model.get("train_attention"):
            # The rule itself: there a compressor may be a class.
            model |= {"lrsa": settings.merged(model["lrsa"], model["train_attention"]), "train_attention": {}}
        arguments = row.settings["data"]["init_args"]
        data_sets = {key: self.data_sets[key] for key in row.weights}
        arguments = {**arguments, "weights": row.weights, "data_sets": data_sets}
        return {
            "seed_everything": seed,
            "trainer": {key: row.settings["trainer"][key] for key in TRAINER if key in row.settings["trainer"]},
            "model": model,
            "data": {**row.settings["data"], "init_args": arguments},
        }


def _once(evaluations: Sequence[Evaluation]) -> list[Evaluation]:
    """Without those that another one serves: of the same questions, the one with answers has the losses too."""
    found: dict[tuple[str, str, str], Evaluation] = {}
    for item in evaluations:
        key = item.rule_digest, item.data_set, item.split
        if key not in found or item.generates > found[key].generates:
            found[key] = item
    return list(found.values())


def digest_of(rule: LRSAConfig | None) -> str:
    """Of a rule, or :data:`DENSE`."""
    return DENSE if rule is None else rule.digest()


def digest(values: Any) -> str:
    """Twelve hex digits of plain values, whatever the order of their keys."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]


def _rule(key: str, below: LRSAConfig | Settings, changes: Mapping[str, Any]) -> LRSAConfig:
    """A rule with changes; a compressor stands in the YAML as a class."""
    with under(key):
        if not isinstance(below, LRSAConfig):
            below = LRSAConfig().replace(**{name: settings.made(value, Compressor) for name, value in below.items()})
        return below.replace(**{name: settings.made(value, Compressor) for name, value in changes.items()})


def _each_layer(inference: Mapping[str, Settings | None]) -> Iterator[tuple[str, Settings | None]]:
    """The attentions of a study, with one NAME-i for each layer i where ``dense_layers`` is a mapping."""
    for name, changes in inference.items():
        if changes is None or not isinstance(changes.get("dense_layers"), dict):
            yield name, changes
            continue
        for layer, dense in _dense_layers(f"inference.{name}.dense_layers", changes["dense_layers"]):
            yield f"{name}-{layer}", {**changes, "dense_layers": dense}


def _dense_layers(key: str, given: Settings) -> Iterator[tuple[int, list[int]]]:
    """Each layer i, with the layers that are dense for it.

    ``{only: 30}`` leaves just layer i of 30 dense, ``{only: 30, beside: [18]}`` layer 18 as well, ``{all_but: 30}`` all
    others.
    """
    if given.keys() not in ({"only"}, {"only", "beside"}, {"all_but"}):
        raise UserError(f"{key}: {given} is not allowed; it must be layers, or {{only: N}} or {{all_but: N}} for each "
                        "of N layers, or {only: N, beside: [LAYER, ...]}")  # fmt: skip
    kind = "only" if "only" in given else "all_but"
    count, beside = given[kind], given.get("beside", [])
    if not is_integer(count) or count < 1:
        raise UserError(f"{key}.{kind}: {count!r} is not allowed; it must be an integer >= 1")
    if not _leaves_some(beside, count):
        raise UserError(f"{key}.beside: {beside!r} is not allowed; it must be a list of different layers from 0 to "
                        f"{count - 1}, not of all of them")  # fmt: skip
    for layer in (layer for layer in range(count) if layer not in beside):
        yield layer, [other for other in range(count) if (other == layer) == (kind == "only") or other in beside]


def _leaves_some(layers: Any, count: int) -> bool:
    """Whether these are different ones of so many layers, and not all of them."""
    if not isinstance(layers, list) or not all(is_integer(layer) and 0 <= layer < count for layer in layers):
        return False
    return len(set(layers)) == len(layers) < count
