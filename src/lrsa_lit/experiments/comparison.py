"""A comparison as a study: systems, the rule and products at budgets, on the same weights and questions.

An attention is an inference of the study, a filter another data set of it, a low rank another row.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lrsa_lit.data.filters import Budgeted
from lrsa_lit.errors import UserError, named
from lrsa_lit.experiments.product import Product, Sized
from lrsa_lit.experiments.product_names import ALL, QUESTION, RULE, products_of
from lrsa_lit.experiments.study import DENSE, MIXTURE, FitSettings, Settings
from lrsa_lit.ops.sparse_attention import LagRelative
from lrsa_lit.paths import resolve
from lrsa_lit.yaml_file import read_settings

if TYPE_CHECKING:
    from lrsa_lit.models import Backbone
    from lrsa_lit.models.low_rank import LowRank

_SHOWN = " [q]"
"""Behind the name of a system whose prompt ends with the question, in tables."""
_OF_PART = ": "


@dataclass(frozen=True)
class Asked:
    """What is compared.

    Attributes:
        model: a file of settings, or a model as a backbone's source.
        data: files of settings, each with a data set.
        budgets: shares of a dense cache.
        systems: names of systems, compressors, filters and LoRC, as ``NAME={arguments}`` with arguments of their own;
            products of these, as ``NAME@SHARE*NAME``; or "all".
        checkpoint: of trained weights.
        limit: most questions of each data set.
        lag_size: L of the rule, in the place of the model's.
        batch_size: questions at a time, on which the seconds depend.
        plugins: modules with more systems.
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
    """A part of the study: one data set, and what of it is compared there.

    Attributes:
        data_set: the name of its file, whatever filter it has.
        attentions: for each of its attentions, as the study names it, the name in tables and the budget, None where it
            has none.
    """

    data_set: str
    attentions: dict[str, tuple[str, float | None]]


def place_of(part: str, attentions: Sequence[str]) -> Place:
    """What a part of a comparison's study is, by its name and those of its attentions.

    A part of attentions alone is called as the data set is, one of a filter or a low rank
    ``DATA_SET: NAME-at-TOKENS-of-TOKENS``. Behind the name stands [q] where the system sees the question before it
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
    """The content of the study's file, and what had to be left out of all, a line each.

    Raises:
        UserError: a name or file is unknown, a budget below what always stays or out of bounds, or factors of a
            product do not suit each other or a data set.
    """
    from lrsa_lit.attention import LRSAConfig
    from lrsa_lit.data.module import QADataModule
    from lrsa_lit.models import Backbone

    sets = _data_sets(asked)
    is_file = asked.model.endswith((".yaml", ".yml"))
    # K is up to the budgets; that of the defaults may be more than L. Whatever the model's file has is not compared.
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
    _check_low_rank(products, asked, backbone)
    study = _Content(None if asked.checkpoint is None else str(asked.checkpoint))
    for name, data in sets.items():
        made = {key: data[key] for key in ("class_path", "init_args")}
        module: QADataModule = fit_settings.made(f"data_sets.{name}", QADataModule, made)
        study.add(name, data | {"measure": module.score})
        for product in products:
            if product.shortens is not None and not module.filterable:
                if product.text in asked.systems:
                    reason = f"has a filter, and {name} no questions about passages"
                    raise UserError("--systems", product.text, reason=reason)
                left_out.append(f"{product.words} is left out of {name}, which has no questions about passages")
                continue
            found, refused = _at_budgets(product, asked, module.max_tokens, backbone)
            left_out += refused
            for budget, sized in found.items():
                study.put(name, product, budget, sized)
    return content | study.content(), list(dict.fromkeys(left_out))


class _Content:
    """The data sets, rows, attentions and parts of a comparison, as they are put together."""

    def __init__(self, checkpoint: str | None) -> None:
        self._row = "base" if checkpoint is None else "checkpoint"
        self._settings: Settings = {} if checkpoint is None else {"checkpoint": checkpoint}
        self._rows: dict[str, Settings | None] = {self._row: self._settings or None}
        self._sets: dict[str, Settings] = {}
        self._inference: dict[str, Settings | None] = {DENSE: None}
        self._parts: dict[str, Settings] = {}

    def add(self, name: str, data: Settings) -> None:
        """A data set as it is, densely."""
        self._sets[name] = data
        self._parts[name] = {"rows": [self._row], "inference": [DENSE], "sets": [name]}

    def put(self, data_set: str, product: Product, budget: str, sized: Sized) -> None:
        """Add a product at a budget, which its name ends with.

        An attention goes to the data set's part, all else has a part of its own.
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
        """What the study's file has of it."""
        return {"data_sets": self._sets, "inference": self._inference, "rows": self._rows, "parts": self._parts}


def _added(among: dict[str, Any], name: str, settings: Settings, end: str = "") -> str:
    """Add settings by a name with an end, or by a further one if others have it; returns that."""
    while among.setdefault(name + end, settings) != settings:
        name += "-other"
    return name + end


def _plain(low_rank: LowRank) -> Settings:
    """What is given of a low rank, as YAML has it."""
    values = dataclasses.asdict(low_rank)
    fields = {field.name: field.default for field in dataclasses.fields(low_rank)}
    given = {name: value for name, value in values.items() if value != fields[name]}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in given.items()}


def _at_budgets(product: Product, asked: Asked, tokens: int, backbone: Backbone) -> tuple[dict[str, Sized], list[str]]:
    """A product at each budget, by what its names end with, and what of all cannot be set to one.

    What has no budget stands under "".
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
                # What is left of a budget has many digits.
                error.value = round(error.value, 4) if isinstance(error.value, float) else error.value
            # What the rule itself cannot have, nobody asked for.
            if ALL not in asked.systems or product.text in (*asked.systems, f"{RULE}{LagRelative.__name__}"):
                raise
            left_out.append(f"{product.words} at {share:g} is left out: {error}")
            continue
        found[f"-at-{round(share * tokens)}-of-{tokens}"] = sized
    return found, left_out


def _check_low_rank(products: Sequence[Product], asked: Asked, backbone: Backbone) -> None:
    """Refuse a model that cannot be factored where products want it, and weights that are loaded after it was."""
    narrow = next((product.narrow for product in products if product.narrow is not None), None)
    if narrow is None:
        return
    if asked.checkpoint is not None:
        hint = "`lrsa export` makes of it a folder for --model"
        raise UserError("--checkpoint", asked.checkpoint, reason=f"is not allowed beside {narrow.label}", hint=hint)
    with named(f"--systems {narrow.label}"):
        dataclasses.replace(backbone, low_rank=narrow.part).check_low_rank()


def _data_sets(asked: Asked) -> dict[str, Settings]:
    """The data set of each file by its name, with the most tokens of an answer that the file asks for."""
    found: dict[str, Settings] = {}
    for name in asked.data:
        settings = read_settings(resolve(name, key="--data"))
        data, stem = settings.get("data"), Path(name).stem
        if not isinstance(data, dict) or "class_path" not in data:
            raise UserError("--data", name, reason="holds no data set; data.class_path is missing")
        if data["class_path"] == MIXTURE:
            raise UserError("--data", name, reason="is of a mixture", hint="name the files of its data sets")
        if stem in found:
            raise UserError("--data", name, reason=f"is a second file of the name {stem}")
        if (data.get("init_args") or {}).get("filter") is not None:
            reason, hint = "has a filter of its own", "leave it out, and name it among --systems"
            raise UserError("--data", name, reason=reason, hint=hint)
        limit = {} if asked.limit is None else {"limit": {"test": asked.limit}}
        found[stem] = {"class_path": data["class_path"], "init_args": (data.get("init_args") or {}) | limit}
        if most := (settings.get("model") or {}).get("max_new_tokens"):
            found[stem]["max_new_tokens"] = most
    return found
