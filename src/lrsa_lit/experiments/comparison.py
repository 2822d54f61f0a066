"""A comparison as a study: systems and the rule at budgets, on the same weights and questions."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from lrsa_lit import plugins
from lrsa_lit.errors import UserError, named
from lrsa_lit.experiments.study import DENSE, MIXTURE, FitSettings, Settings
from lrsa_lit.paths import resolve
from lrsa_lit.yaml_file import read_settings

if TYPE_CHECKING:
    from lrsa_lit.attention import LRSAConfig
    from lrsa_lit.data.module import QADataModule
    from lrsa_lit.systems import System

ALL = "all"
RULE = "rule-"
"""Before a compressor's name: the rule with it, which a system of the same name is not."""
_QUESTION, _SHOWN = "-q", " [q]"
"""Behind the name of a system whose prompt ends with the question: in names of metrics, and in tables."""


@dataclass(frozen=True)
class Asked:
    """What is compared.

    Attributes:
        model: a file of settings, or a model as a backbone's source.
        data: files of settings, each with a data set.
        budgets: shares of a dense cache.
        systems: names of systems and compressors, as ``NAME={arguments}`` with arguments of their own; or "all".
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


def study_of(asked: Asked, fit_settings: FitSettings) -> tuple[Settings, list[str]]:
    """The content of the study's file, and what had to be left out of all, a line each.

    Raises:
        UserError: a name or file is unknown, or a budget below what always stays or out of bounds.
    """
    from lrsa_lit.attention import LRSAConfig
    from lrsa_lit.data.module import QADataModule

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
    chosen, left_out = _chosen(asked.systems, rule)
    inference: dict[str, Settings | None] = {DENSE: None}
    parts = {}
    for name, data in sets.items():
        made = {key: data[key] for key in ("class_path", "init_args")}
        module: QADataModule = fit_settings.made(f"data_sets.{name}", QADataModule, made)
        own, refused = _at_budgets(chosen, asked, module.max_tokens, fit_settings, given)
        data["measure"] = module.score
        inference |= {attention: {"system": None, **config.to_dict()} for attention, config in own.items()}
        row = "base" if asked.checkpoint is None else "checkpoint"
        parts[name] = {"rows": [row], "inference": [DENSE, *own], "sets": [name]}
        left_out += refused
    rows = {"base": None} if asked.checkpoint is None else {"checkpoint": {"checkpoint": str(asked.checkpoint)}}
    content |= {"data_sets": sets, "inference": inference, "rows": rows, "parts": parts}
    return content, list(dict.fromkeys(left_out))


def system_and_budget(attention: str) -> tuple[str, float | None]:
    """The system's name, and the share of the cache, of an attention of a comparison; None where it has no budget.

    Behind the name stands [q] where the system sees the question before it cuts.
    """
    name, _, budget = attention.partition("-at-")
    pairs, of, tokens = budget.partition("-of-")
    shown = name.removesuffix(_QUESTION) + _SHOWN if name.endswith(_QUESTION) else name
    return shown, int(pairs) / int(tokens) if of else None


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
        limit = {} if asked.limit is None else {"limit": {"test": asked.limit}}
        found[stem] = {"class_path": data["class_path"], "init_args": (data.get("init_args") or {}) | limit}
        if most := (settings.get("model") or {}).get("max_new_tokens"):
            found[stem]["max_new_tokens"] = most
    return found


def _chosen(names: Sequence[str], rule: LRSAConfig) -> tuple[dict[str, LRSAConfig], list[str]]:
    """The systems, and the rule with compressors, that are asked for, and what of all cannot be made."""
    systems, compressors = plugins.registered("systems"), plugins.registered("compressors")
    known = {**{RULE + name: found for name, found in compressors.items()}, **systems}
    wanted = list(known) if ALL in names else names
    chosen: dict[str, LRSAConfig] = {}
    left_out: list[str] = []
    for name in wanted:
        label, _, arguments = name.partition("=")
        label = RULE + label if label not in known and label in compressors else label
        allowed = f"{ALL}, or some of {', '.join(known)}"
        if label not in known:
            raise UserError("--systems", label, allowed)
        kind = "system" if label in systems else "compressor"
        try:
            settings = _class_of(known[label]) | {"init_args": _arguments(name, arguments)}
            with _of_system(label, kind):
                made = rule.replace(**{kind: settings})
            if ALL in names and made.compressor.plain is not made.compressor:
                raise UserError("compressor", reason=f"it answers as rule-{type(made.compressor.plain).__name__} does")
        except UserError as error:
            if ALL not in names:
                raise
            left_out.append(f"{label} is left out: {error}")
            continue
        label += _QUESTION if made.system and _cuts_questions(made.system) else ""
        if label in chosen:
            raise UserError("--systems", system_and_budget(label)[0], allowed, reason="stands twice")
        chosen[label] = made
    return chosen, left_out


def _at_budgets(
    chosen: dict[str, LRSAConfig], asked: Asked, tokens: int, fit_settings: FitSettings, given: Settings
) -> tuple[dict[str, LRSAConfig], list[str]]:
    """The attentions at each budget, by their names, and what of all cannot be set to one."""
    from lrsa_lit.attention import at_budget
    from lrsa_lit.models import Backbone
    from lrsa_lit.ops.sparse_attention import LagRelative

    backbone: Backbone = fit_settings.made("model.backbone", Backbone, given["model"]["backbone"])
    config = backbone.config.get_text_config()
    head = backbone.head
    found, left_out = {}, []
    for label, attention in chosen.items():
        if attention.system is not None and not attention.system.budget_field:
            # It holds everything.
            found[label] = attention
            continue
        for share in asked.budgets:
            name = f"{label}-at-{round(share * tokens)}-of-{tokens}"
            try:
                with named("--budgets"):
                    found[name] = at_budget(attention, share, tokens, config.num_hidden_layers, head)
            except UserError as error:
                # What the rule itself cannot have, nobody asked for.
                if ALL not in asked.systems or label == f"{RULE}{LagRelative.__name__}":
                    raise
                left_out.append(f"{label} at {share:g} is left out: {error}")
    return found, left_out


def _cuts_questions(system: System) -> bool:
    """Whether it was chosen to: to what has no such setting, the end of a prompt means nothing."""
    return bool(system.to_dict()["init_args"].get("question"))


@contextlib.contextmanager
def _of_system(label: str, kind: str) -> Iterator[None]:
    """Name an argument of a system or compressor by the flag: ``--systems SnapKV.window``."""
    try:
        yield
    except UserError as error:
        argument = error.field.removeprefix(kind).replace(".init_args", "")
        error.field = f"--systems {label}" + (argument if argument.startswith(".") else "")
        raise


def _class_of(found: type) -> Settings:
    return {"class_path": f"{found.__module__}.{found.__qualname__}"}


def _arguments(name: str, text: str) -> Any:
    try:
        arguments = yaml.safe_load(text) if text else {}
    except yaml.YAMLError:
        arguments = None
    if not isinstance(arguments, dict):
        raise UserError("--systems", name, "NAME, or NAME={argument: value}")
    return arguments
