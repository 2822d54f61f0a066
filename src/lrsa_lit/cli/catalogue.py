"""What settings may name: the project's classes by short name, shipped files, and keys; no class is imported."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lrsa_lit import plugins
from lrsa_lit.cli import source_text
from lrsa_lit.cli.source_text import Setting
from lrsa_lit.paths import shipped
from lrsa_lit.yaml_file import read_settings

TRAINER = "lightning.pytorch.trainer.trainer.Trainer"
DATA, TASK = "lrsa_lit.data.QADataModule", "lrsa_lit.tasks.LongContextQA"
SLOTS = {
    "data": "data",
    "data.filter": "filters",
    "model.lrsa.compressor": "compressors",
    "model.lrsa.system": "systems",
    "model.objective": "objectives",
    "trainer.callbacks": "callbacks",
}
"""Settings that take a class, and the kind of that class."""
OTHERS = {
    "model.train_top_k": ("lrsa_lit.tasks.AnnealedTopK", "lrsa_lit.tasks.SampledTopK"),
    "model.head_gates": ("lrsa_lit.tasks.HeadGates",),
    "model.spectra": ("lrsa_lit.tasks.SoCo",),
    "model.digests": ("lrsa_lit.tasks.Digests",),
    "trainer.strategy": ("lrsa_lit.strategies.FullySharded", "lrsa_lit.strategies.SharedDevice"),
    "trainer.logger": ("lrsa_lit.tracking.MLflowRun",),
}
"""Further settings that take a class, and this project's classes for them."""
# Settings that are a mapping of arguments of a fixed class.
_PARTS = {
    "model": TASK,
    "model.backbone": "lrsa_lit.models.Backbone",
    "model.backbone.lora": "lrsa_lit.models.LoRA",
    "model.backbone.low_rank": "lrsa_lit.models.LowRank",
    "model.backbone.rope_scaling": "lrsa_lit.models.RopeScaling",
    "model.lrsa": "lrsa_lit.attention.LRSAConfig",
    "trainer": TRAINER,
}
_CALLBACKS = (
    "lrsa_lit.callbacks",
    "lrsa_lit.tracking",
    "lrsa_lit.checkpoints",
    *(f"lrsa_lit.analysis.{name}" for name in ("callback", "ablation", "run_pictures", "survival")),
)
MODELINE = "# yaml-language-server: $schema="
"""The start of a comment that tells editors the schema of a YAML file."""
EVERY_RUN_HAS = {
    "CheckedForm",
    "ExactState",
    "FiniteLoss",
    "GatesRecord",
    "GracefulStop",
    "MonitoredMetrics",
    "RecordConfig",
}
"""Callbacks that the command line adds to every run."""
_LIGHTNING = "lightning.pytorch.callbacks"
_ROOTS = {"Callback", "BasePredictionWriter", "ModelCheckpoint"}
_OWN = ("config", "c", "help", "help-all", "print_config", "seed_everything", "validate_first", "best_by",
        "estimate", "plugins", "task")  # fmt: skip
_EVALUATIONS = ("budget", "cache_tokens", "cache-tokens")
_LENGTH = {"--max-new-tokens N": "maximum number of tokens of a summary; default 256"}
OF_TOOLS = {
    "input-moments": {
        "--to FILE": "file to write the moments to",
        "--contexts N": "number of training prompts to read; default 8",
        "--tokens N": "tokens to read from the start of each prompt; default 512",
    },
    "preference-pairs": {
        "--judge MODEL": "model that answers questions from each rewriting: a fit's checkpoint, a folder or a hub name",
        "--to FOLDER": "folder for candidates.jsonl, train.jsonl and val.jsonl; existing candidates are reused",
        "--pairs N": "number of pairs to make, if the training split has enough; default 300",
        "--weak": "also use passages whose rewritings all fail",
    }
    | _LENGTH,
    "summarise": {
        "--writer MODEL": "model that summarises: a fit's checkpoint, a folder or a hub name",
        "--to FILE": "file for the summaries; existing ones are reused",
        "--splits NAME …": "splits to summarise: train, val, test; default: all splits of the data set",
    }
    | _LENGTH,
    "token-gates": {"--to FILE": "file to write the gates to"},
}
"""The own options of tools that also take a fit's options."""


@functools.cache
def named(kind: str) -> dict[str, str]:
    """The dotted paths of a kind's shipped classes, by short name."""
    if kind == "callbacks":
        found = {name: path for home in _CALLBACKS for name, path in _exports(home) if source_text.bases(path) & _ROOTS}
        return {name: path for name, path in sorted(found.items()) if name not in EVERY_RUN_HAS}
    home, base = plugins.KINDS[kind].home, plugins.KINDS[kind].base
    return {
        name: path
        for name, path in _exports(home)
        if any(each.node.name == base for each in source_text.lineage(path)[1:]) and not source_text.is_abstract(path)
    }


def _exports(home: str) -> Iterator[tuple[str, str]]:
    for name in source_text.exported(home):
        if source_text.find(f"{home}.{name}") is not None:
            yield name, f"{home}.{name}"


def added(kind: str) -> dict[str, str]:
    """Classes of a kind that are not shipped, by name, with a short description.

    They come from loaded or registered plugins; for callbacks, from Lightning.
    """
    if kind == "callbacks":
        return dict.fromkeys(source_text.exported(_LIGHTNING), _LIGHTNING)
    return {point.name: f"from {point.value}" for point in plugins.points(kind)} | {
        name: (found.__doc__ or "").strip().partition("\n")[0] for name, found in plugins.added(kind).items()
    }


def class_of(kind: str, name: object) -> str | None:
    """The dotted path of a shipped class, given its short name or path; None for any other class."""
    known, text = named(kind), str(name)
    home, _, last = text.rpartition(".")
    within = kind != "callbacks" and f"{home}.".startswith(f"{plugins.KINDS[kind].home}.")
    return known.get(text if not home else last if within or known.get(last) == text else "")


def keys(path: str) -> Mapping[str, Setting]:
    """The settings of a class, without those that the command line sets itself."""
    return {name: each for name, each in source_text.settings(path).items() if (path, name) != (DATA, "tokenizer")}


def part_of(key: str) -> str | None:
    """The fixed class whose arguments are below a key; None if settings choose the class or the key is unknown."""
    return _PARTS.get(key)


def parts() -> tuple[str, ...]:
    """The keys that :func:`part_of` knows."""
    return tuple(_PARTS)


@functools.cache
def top_level(command: str) -> frozenset[str]:
    """The first components of all keys that a run takes."""
    evaluates = command in ("validate", "test", "predict")
    own = source_text.parameters(TRAINER, command if evaluates else "fit").keys()
    handed_over = {"model", "datamodule", "dataloaders", "train_dataloaders", "val_dataloaders"}
    of_tool = (option.split()[0].removeprefix("--") for option in OF_TOOLS.get(command, ()))
    others = _EVALUATIONS if evaluates else tuple(of_tool)
    return frozenset({*_OWN, *others, *(own - handed_over), "model", "data", "trainer"})


@functools.cache
def configs() -> dict[str, Path]:
    """Shipped YAML files by their name below ``configs/``, such as ``model/smollm2.yaml``, without studies."""
    root = shipped("configs/model/tiny.yaml").parents[1]
    found = {str(path.relative_to(root)): path for path in sorted(root.rglob("*.yaml"))}
    return {name: path for name, path in found.items() if not _first(path).startswith("# lrsa study ")}


def about(path: Path) -> str:
    """The description of a shipped file: the comment in its second line, or ""."""
    second = path.read_text(encoding="utf-8").splitlines()[1]
    return second.removeprefix("#").strip() if second.startswith("#") and not second.startswith(MODELINE) else ""


def setting_files(key: str, folder: str) -> list[str]:
    """Shipped files of a folder that set a key."""
    return [
        f"configs/{name}"
        for name, path in configs().items()
        if name.startswith(f"{folder}/") and value_at(read_settings(path), key) is not None
    ]


def value_at(settings: Any, key: str) -> Any:
    """The value of a dotted key within settings; None if it is not set."""
    for name in key.split("."):
        settings = settings.get(name) if isinstance(settings, Mapping) else None
    return settings


def _first(path: Path) -> str:
    with path.open(encoding="utf-8") as file:
        return file.readline()
