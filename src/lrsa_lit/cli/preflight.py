"""Checks before a run's parts are built, of values on which Lightning would fail much later; silences libraries."""

from __future__ import annotations

import importlib.util
import logging
import math
import os
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.pytorch.strategies import Strategy

from lrsa_lit.attention.budgets import heads_of
from lrsa_lit.attention.families import check_config
from lrsa_lit.classes import named_class
from lrsa_lit.context_parallel import shortest_row, too_short
from lrsa_lit.data import token_cache
from lrsa_lit.data.module import SPLITS, QADataModule
from lrsa_lit.data.policies import Packed
from lrsa_lit.errors import UserError, message_of, under
from lrsa_lit.models.checkpoint_file import holds_shards
from lrsa_lit.paths import expanded
from lrsa_lit.strategies import FullySharded
from lrsa_lit.tasks import Digests, LongContextQA
from lrsa_lit.tasks.attentions import check_names
from lrsa_lit.tasks.shared_batch import check_shareable
from lrsa_lit.terminal import log_to

_log = logging.getLogger("lrsa_lit")
_NOISE = (
    ".*args parameter is intended.*",
    ".*does not have many workers.*",
    ".*LeafSpec.*",
    ".*set_vital.*",
    # Metrics of a validation are already reduced over all devices.
    ".*when logging on epoch level in distributed setting.*",
    # The loss is returned as a view, and nothing changes it in place.
    "FSDP2-wrapped module .* returned a view tensor.*",
    # Evaluating a checkpoint in another folder is harmless.
    "The dirpath has changed.*",
    # The folder of a resumed run contains its earlier files.
    "Checkpoint directory .* exists and is not empty.*",
)
_INTERVALS = ("accumulate_grad_batches", "check_val_every_n_epoch", "log_every_n_steps", "val_check_interval")


_OF_LOGGERS = {"WandbLogger": ("wandb",), "TensorBoardLogger": ("tensorboard", "tensorboardX")}
"""Optional packages of Lightning's loggers; each logger needs one of them."""


def check_strategy(subcommand: str, setting: Any, checkpoint: str | None) -> None:
    """Refuse a strategy that cannot train or predict, or cannot read the checkpoint of a sharded model."""
    path = setting.get("class_path") if hasattr(setting, "get") else setting
    # A short name, such as ddp, is one of Lightning's.
    strategy = named_class("trainer.strategy", path, (Strategy,)) if "." in str(path) else Strategy
    if subcommand == "predict" and not getattr(strategy, "predicts", True):
        reason = "is not allowed for predict, where devices get unequal shares"
        hint = "predict with a model written by lrsa export, on one device or with configs/trainer/ddp.yaml"
        raise UserError("trainer.strategy", strategy.__name__, reason=reason, hint=hint)
    if subcommand == "fit" and not getattr(strategy, "trains", True):
        raise UserError("trainer.strategy", strategy.__name__, hint="it works only with validate, test and predict")
    if checkpoint is not None and holds_shards(Path(checkpoint)) and not getattr(strategy, "reads_shards", False):
        reason = "is of a sharded model, which trainer.strategy cannot read"
        hint = "add --config configs/trainer/fsdp.yaml, or convert it with lrsa export for model.backbone.source"
        raise UserError("ckpt_path", checkpoint, reason=reason, hint=hint)


def check_model(task: LongContextQA) -> None:
    """Refuse, by its config, a model that does not support the rule, and rules for layers that it does not have."""
    config = task.backbone.config
    with under("model.backbone"):
        task.backbone.check_low_rank()
    check_config(config)
    task.check_layers(config.num_hidden_layers, heads_of(config))


def check_pairs(task: LongContextQA, data: QADataModule) -> None:
    """Refuse an objective that compares two answers if the data has only one for each prompt."""
    for term in task.objective.terms:
        if term.needs_rejected and not data.rejects:
            reason = f"{type(term).__name__} needs two answers to each prompt, and {type(data).__name__} has one"
            raise UserError("model.objective", reason=reason, hint="use data such as lrsa_lit.data.PreferencePairs")


def check_context(task: LongContextQA, data: QADataModule, strategy: Strategy) -> None:
    """Refuse settings with which devices that share rows cannot train."""
    if not isinstance(strategy, FullySharded) or strategy.context == 1:
        return
    with under("trainer.strategy.init_args"):
        check_shareable(task.train_config, task.objective, task.backbone.config)
        rule, packing = (task.train_config or task.lrsa).rule, data.packing
        if packing is not None and packing.tokens < shortest_row(strategy.context, rule):
            raise too_short(packing.tokens, strategy.context, rule, "data.init_args.packing.tokens is")


def check_rows(task: LongContextQA, data: QADataModule, strategy: Strategy) -> None:
    """Refuse prepared examples that are too short for devices to share; packed examples fill rows of a fixed length."""
    if not isinstance(strategy, FullySharded) or strategy.context == 1 or isinstance(data.policy, Packed):
        return
    data.setup("fit")
    rule, lengths = (task.train_config or task.lrsa).rule, token_cache.longest(data.open_split("train"))
    shortest = max(min(lengths), data.policy.row_length(lengths))
    if shortest < shortest_row(strategy.context, rule):
        with under("trainer.strategy.init_args"):
            raise too_short(shortest, strategy.context, rule, "the shortest training example has")


def check_positions(task: LongContextQA, data: QADataModule) -> None:
    """Refuse examples that need more positions than the model has, answers included; digests need fewer."""
    backbone, new = task.backbone, task.max_new_tokens
    positions = getattr(backbone.config, "max_position_embeddings", None) or sys.maxsize
    needed = new + (data.max_tokens if task.digests is None else task.digests.longest(data.max_tokens))
    if needed > positions:
        has = f"{backbone.name} has {positions} positions and model.max_new_tokens takes {new} of them"
        more = f"model.backbone.rope_scaling: {{rope_type: yarn, factor: {math.ceil(needed / positions)}}}"
        raise UserError("data.init_args.max_tokens", data.max_tokens, hint=f"{has}; get more by {more}")


def check_digests(subcommand: str, digests: Digests, data: QADataModule) -> None:
    """Refuse to predict in the digests' repeat stage, and digests of packed examples."""
    if subcommand == "predict" and digests.stage == "repeat":
        raise UserError("model.digests.init_args.stage", "repeat", "answer for predict")
    if data.packing is not None:
        raise UserError("data.init_args.packing", reason="is not allowed with model.digests", allowed="null")


def check_contexts(subcommand: str, task: LongContextQA, data: QADataModule) -> None:
    """Refuse prepared data if some examples cannot be digested, or are too long with digests."""
    if task.digests is None:
        return
    data.setup(subcommand)
    for split in SPLITS:
        for size in token_cache.sizes(data.open_split(split)) if split in data.report else ():
            task.digests.check_size(size, task.max_new_tokens)


def check_parts_of_data(subcommand: str, task: LongContextQA, data: QADataModule) -> None:
    """Refuse attentions that have the name of a data set or task in the prepared data."""
    split = {"fit": "val", "validate": "val", "test": "test"}.get(subcommand)
    if split in data.splits():
        data.setup(subcommand)
        with under("model"):
            check_names(task.attentions, data.groups(split))


def root_folder(trainer: Any) -> Path:
    """The folder of runs; a leading ~ is also expanded in the setting itself."""
    given = str(trainer.get("default_root_dir") or ".")
    try:
        get_filesystem(given)
    except (ValueError, ImportError) as error:
        reason = f"is not allowed ({message_of(error)})"
        raise UserError("trainer.default_root_dir", given, "a folder", reason=reason) from None
    folder = expanded("trainer.default_root_dir", given)
    if given.startswith("~"):
        trainer.default_root_dir = str(folder)
    return folder


def check_amounts(subcommand: str, trainer: Mapping[str, Any]) -> None:
    """Refuse limits and intervals of zero batches, and more processes on a CPU than it has cores."""
    stage = {"fit": "train", "validate": "val"}.get(subcommand, subcommand)
    for name in (*_INTERVALS, f"limit_{stage}_batches"):
        value = trainer.get(name)
        if isinstance(value, int | float) and value <= 0:
            raise UserError(f"trainer.{name}", value, f"more than 0 for {subcommand}")
    devices, cores = str(trainer.get("devices")), os.cpu_count() or 1
    on_cpu = trainer.get("accelerator") == "cpu" or not torch.cuda.is_available()
    if on_cpu and devices.isdecimal() and int(devices) > cores:
        raise UserError("trainer.devices", int(devices), f"at most {cores}, the cores of this CPU")


def check_loggers(setting: Any) -> None:
    """Refuse loggers whose package is not installed; Lightning would report it inside a long message."""
    for logger in setting if isinstance(setting, list) else [setting]:
        name = str(getattr(logger, "get", lambda _: "")("class_path")).rpartition(".")[2]
        packages = _OF_LOGGERS.get(name, ())
        if packages and not any(importlib.util.find_spec(package) for package in packages):
            reason = f"{name} needs {packages[0]}, which is not installed"
            raise UserError("trainer.logger", reason=reason, hint="pip install 'lrsa-lit[loggers]'")


def note_environment() -> None:
    """Warn about environment variables that Lightning would read as settings: here only files and flags count."""
    prefixes = ("PL_TRAINER_", *(f"PL_{command}__" for command in ("FIT", "VALIDATE", "TEST", "PREDICT")))
    if ignored := sorted(name for name in os.environ if name.startswith(prefixes)):
        _log.warning("Ignored environment variables: %s; settings are given by --config and flags", ", ".join(ignored))


def quiet_libraries() -> None:
    """Log this project's messages through rich; silence messages that no user can act on."""
    log_to()
    # Of several processes, only the first one logs.
    first = all(os.environ.get(name, "0") == "0" for name in ("RANK", "LOCAL_RANK", "NODE_RANK"))
    if not first:
        logging.getLogger("lrsa_lit").setLevel(logging.WARNING)
    # Lightning's start-up hints, and retries whose outcome is raised or logged anyway.
    hints = "lightning.pytorch.utilities.rank_zero", "lightning.pytorch.accelerators.cuda"
    for name in (*hints, "urllib3.connectionpool", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.ERROR)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for pattern in _NOISE:
        warnings.filterwarnings("ignore", message=pattern)
