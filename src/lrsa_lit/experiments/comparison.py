"""A comparison as a study: systems, the rule and products at budgets, on the same weights and questions.

In the study, each attention is an inference, each filter adds a data set, and each low rank adds a row.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lrsa_lit.data.filters import Budgeted
from lrsa_lit.errors import UserError, named
from lrsa_lit.experiments.product import Factor, Product, Sized
from lrsa_lit.experiments.product_names import ALL, QUESTION, RULE, products_of
from lrsa_lit.experiments.study import DENSE, MIXTURE, FitSettings, Settings
from lrsa_lit.ops.sparse_attention import LagRelative
from lrsa_lit.paths import resolve
from lrsa_lit.yaml_file import read_settings

if TYPE_CHECKING:
    from lrsa_lit.models import Backbone
    from lrsa_lit.models.low_rank import LowRank

_SHOWN = " [q]"
"""In tables, follows the name of a system that sees the question before it cuts."""
_OF_PART = ": "


@dataclass(frozen=True)
class Asked:
    """The arguments of a comparison.

    Attributes:
        model: a settings file, or a model as in a backbone's ``source``.
        data: settings files, each with a data set.
        budgets: budgets as shares of a dense cache.
        systems: names of systems, compressors, filters and LoRC, optionally with arguments (``NAME={arguments}``);
            products of them (``NAME@SHARE*NAME``); or "all".
        checkpoint: checkpoint of trained weights.
        limit: maximum number of questions per data set.
        lag_size: L of the rule; replaces the model's.
        batch_size: questions per batch; measured seconds depend on it.
        plugins: modules that register more systems.
    """

    model: str
    data: Sequence[str]
    budgets: Sequence[float]
    systems: Sequence[str]
    checkpoint: Path | None = None
    limit: int | None = None
    lag_size: int = 128
    batch_size: int = 1
    plugins: Sequence[str] = ()


class Place(NamedTuple):
    """A part of the study: one data set, and the attentions that are compared on it.

    Attributes:
        data_set: name of the data set's file, independent of a filter.
        attentions: for each attention's name in the study, its name in tables and its budget, or None without one.
    """

    data_set: str
    attentions: dict[str, tuple[str, float | None]]


def place_of(part: str, attentions: Sequence[str]) -> Place:
    """Parse the name of a part of a comparison's study, and the names of its attentions.

    A part with only attentions is named like its data set; one with a filter or low rank is named
    ``DATA_SET: NAME-at-TOKENS-of-TOKENS``. The name in tables ends with [q] if the system sees the question before it
    cuts.
    """
    data_set, _, product = part.partition(_OF_PART)
    return Place(data_set, {name: _system_and_budget(product or name) for name in attentions})


def _system_and_budget(name: str) -> tuple[str, float | None]:
    name, _, budget = name.partition("-at-")
    pairs, of, tokens = budget.partition("-of-")
    shown = name.removesuffix(QUESTION) + _SHOWN if name.endswith(QUESTION) else name
    return shown, int(pairs) / int(tokens) if of else None


def study_of(asked: Asked, fit_settings: FitSettings) -> tuple[Settings, list[str]]:
    """The content of the study's file, and one line for each system of "all" that had to be left out.

    Raises:
        UserError: a name or file is unknown, a budget is out of bounds or smaller than what is always kept, or the
            factors of a product do not suit each other or a data set.
    """
    from lrsa_lit.attention import LRSAConfig
    from lrsa_lit.data.module import QADataModule
    from lrsa_lit.models import Backbone

    sets = _data_sets(asked)
    is_file = asked.model.endswith((".yaml", ".yml"))
    # The budgets decide K, so any K <= L will do here. Systems and K of each head in the model's file are not compared.
    sizes = {"lag_size": asked.lag_size, "top_k": asked.lag_size // 4}
    model: Settings = {"lrsa": {"system": None, "head_top_k": None, **sizes}}
    model |= {} if is_file else {"backbone": {"source": asked.model}}
    content: Settings = {
        "plugins": list(asked.plugins),
        "configs": [asked.model] if is_file else [],
        "trainer": {"max_steps": 0},
        "model": model,
        "data": {"init_args": {"eval_batch_size": asked.batch_size}},
    }
    options = {"--plugins": content["plugins"], "--config": content["configs"]}
    arguments = [part for option, names in options.items() for name in names for part in (option, name)]
    no_data = {"class_path": MIXTURE, "init_args": {"data_sets": {}, "weights": {}}}
    given = fit_settings.given(arguments, [{"model": model, "data": no_data}])
    rule = fit_settings.made("model.lrsa", LRSAConfig, given["model"]["lrsa"])
    products, left_out = products_of(asked.systems, rule)
    backbone: Backbone = fit_settings.made("model.backbone", Backbone, given["model"]["backbone"])
    products, refused = _factorable(products, asked, backbone)
    left_out += refused
    study = _Content(None if asked.checkpoint is None else str(asked.checkpoint))
    for name, data in sets.items():
        made = {key: data[key] for key in ("class_path", "init_args")}
        module: QADataModule = fit_settings.made(f"data_sets.{name}", QADataModule, made)
        study.add(name, data | {"measure": module.score})
        for product in products:
            if product.shortens is not None and not module.filterable:
                if product.text in asked.systems:
                    reason = f"has a filter, but {name} has no questions about passages"
                    raise UserError("--systems", product.text, reason=reason)
                left_out.append(f"{product.words} is left out of {name}, which has no questions about passages")
                continue
            found, refused = _at_budgets(product, asked, module.max_tokens, backbone)
            left_out += refused
            for budget, sized in found.items():
                study.put(name, product, budget, sized)
    return content | study.content(), list(dict.fromkeys(left_out))


class _Content:
    """Collects the data sets, rows, attentions and parts of a comparison."""

    def __init__(self, checkpoint: str | None) -> None:
        self._row = "base" if checkpoint is None else "checkpoint"
        self._settings: Settings = {} if checkpoint is None else {"checkpoint": checkpoint}
        self._rows: dict[str, Settings | None] = {self._row: self._settings or None}
        self._sets: dict[str, Settings] = {}
        self._inference: dict[str, Settings | None] = {DENSE: None}
        self._parts: dict[str, Settings] = {}

    def add(self, name: str, data: Settings) -> None:
        """Add an unfiltered data set with dense attention."""
        self._sets[name] = data
        self._parts[name] = {"rows": [self._row], "inference": [DENSE], "sets": [name]}

    def put(self, data_set: str, product: Product, budget: str, sized: Sized) -> None:
        """Add a product at a budget; ``budget`` is the end of its name.

        An attention is added to the data set's part; other products get a separate part.
        """
        attention = DENSE
        if sized.attention is not None:
            settings = {"system": None, **sized.attention.to_dict()}
            attention = _added(self._inference, product.name, settings, budget)
        if product.attends_alone:
            self._parts[data_set]["inference"].append(attention)
            return
        row, name = self._row, data_set
        if sized.narrow is not None:
            assert product.narrow is not None
            row = f"{self._row}-{product.narrow.label}-r{sized.narrow.rank}"
            narrow = {"model": {"backbone": {"low_rank": _plain(sized.narrow)}}}
            row = _added(self._rows, row, {**self._settings, **narrow})
        if sized.shortens is not None:
            assert product.shortens is not None
            kept = f"-{sized.shortens.kept:.4g}" if isinstance(sized.shortens, Budgeted) else ""
            data = self._sets[data_set]
            arguments = data["init_args"] | {"filter": sized.shortens.to_dict()}
            name = f"{data_set}-{product.shortens.label}{kept}"
            name = _added(self._sets, name, data | {"init_args": arguments})
        part = f"{data_set}{_OF_PART}{product.words}{budget}"
        self._parts[part] = {"rows": [row], "inference": [attention], "sets": [name]}

    def content(self) -> Settings:
        """The collected sections of the study's file."""
        return {"data_sets": self._sets, "inference": self._inference, "rows": self._rows, "parts": self._parts}


def _added(among: dict[str, Any], name: str, settings: Settings, end: str = "") -> str:
    """Add settings under ``name + end``, or under a new name if that has other settings; return the name used."""
    while among.setdefault(name + end, settings) != settings:
        name += "-other"
    return name + end


def _plain(low_rank: LowRank) -> Settings:
    """The settings of a low rank that differ from the defaults, in plain types."""
    values = dataclasses.asdict(low_rank)
    fields = {field.name: field.default for field in dataclasses.fields(low_rank)}
    given = {name: value for name, value in values.items() if value != fields[name]}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in given.items()}


def _at_budgets(product: Product, asked: Asked, tokens: int, backbone: Backbone) -> tuple[dict[str, Sized], list[str]]:
    """A product at each budget, keyed by the end of its name, and messages about budgets that are left out.

    A product without a budget has the key "".
    """
    if not product.has_budget:
        return {"": product.asked_for}, []
    config, head = backbone.config.get_text_config(), backbone.head
    found, left_out = {}, []
    for share in asked.budgets:
        try:
            sized = product.at(share, tokens, config, head)
        except UserError as error:
            if error.field == "budget":
                of_product = f"--systems {product.text} at {share:g}"
                error.field = of_product if len(product.factors) > 1 else "--budgets"
                # The rest of a budget has many digits.
                error.value = round(error.value, 4) if isinstance(error.value, float) else error.value
            if _must_work(product, asked):
                raise
            left_out.append(f"{product.words} at {share:g} is left out: {error}")
            continue
        found[f"-at-{round(share * tokens)}-of-{tokens}"] = sized
    return found, left_out


def _must_work(product: Product, asked: Asked) -> bool:
    """Whether the user named a product, or it is the rule itself; others, which "all" added, may be left out."""
    return ALL not in asked.systems or product.text in (*asked.systems, f"{RULE}{LagRelative.__name__}")


def _factorable(products: list[Product], asked: Asked, backbone: Backbone) -> tuple[list[Product], list[str]]:
    """The products without those whose low rank "all" added to a model that allows none, and a line for each of them.

    Raises:
        UserError: a product that the user named needs a low rank, but the model cannot be factored, or its weights
            come from a checkpoint.
    """
    kept, left_out = [], []
    for product in products:
        try:
            if product.narrow is not None:
                _check_low_rank(product.narrow, asked, backbone)
        except UserError as error:
            if _must_work(product, asked):
                raise
            left_out.append(f"{product.words} is left out: {error}")
            continue
        kept.append(product)
    return kept, left_out


def _check_low_rank(narrow: Factor[LowRank], asked: Asked, backbone: Backbone) -> None:
    if asked.checkpoint is not None:
        hint = "export it with `lrsa export`, and give the folder as --model"
        raise UserError("--checkpoint", asked.checkpoint, reason=f"is not allowed with {narrow.label}", hint=hint)
    with named(f"--systems {narrow.label}"):
        dataclasses.replace(backbone, low_rank=narrow.part).check_low_rank()


def _data_sets(asked: Asked) -> dict[str, Settings]:
    """The data set of each file, by the file's name, with ``max_new_tokens`` if the file sets it."""
    found: dict[str, Settings] = {}
    for name in asked.data:
        if name.endswith(".jsonl"):
            line = f"data: {{class_path: QAFiles, init_args: {{test: {name}}}}}"
            allowed = f"a file of settings, such as one with the line `{line}`"
            raise UserError("--data", name, allowed, reason="holds the data itself")
        settings = read_settings(resolve(name, key="--data"))
        data, stem = settings.get("data"), Path(name).stem
        if not isinstance(data, dict) or "class_path" not in data:
            raise UserError("--data", name, reason="holds no data set; data.class_path is missing")
        if data["class_path"] == MIXTURE:
            raise UserError("--data", name, reason="is a mixture", hint="name the files of its data sets")
        if stem in found:
            raise UserError("--data", name, reason=f"is a second file with the name {stem}")
        if (data.get("init_args") or {}).get("filter") is not None:
            reason, hint = "has a filter already", "remove it there, and name it in --systems"
            raise UserError("--data", name, reason=reason, hint=hint)
        limit = {} if asked.limit is None else {"limit": {"test": asked.limit}}
        found[stem] = {"class_path": data["class_path"], "init_args": (data.get("init_args") or {}) | limit}
        if most := (settings.get("model") or {}).get("max_new_tokens"):
            found[stem]["max_new_tokens"] = most
    return found
