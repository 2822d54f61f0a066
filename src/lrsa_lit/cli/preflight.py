"""What is checked, and silenced, before a run's parts are built: values that Lightning would trip over much later."""

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
    # The metrics of a validation are of all devices already.
    ".*when logging on epoch level in distributed setting.*",
    # The loss is a view of itself, and nobody changes it in place.
    "FSDP2-wrapped module .* returned a view tensor.*",
    # Evaluating a checkpoint in another folder is no reason for concern.
    "The dirpath has changed.*",
    # Nor is a resumed run's folder, which holds what it wrote before.
    "Checkpoint directory .* exists and is not empty.*",
)
_INTERVALS = ("accumulate_grad_batches", "check_val_every_n_epoch", "log_every_n_steps", "val_check_interval")


_OF_LOGGERS = {"WandbLogger": ("wandb",), "TensorBoardLogger": ("tensorboard", "tensorboardX")}
"""Optional packages of Lightning's loggers, of which one is needed."""


def check_strategy(subcommand: str, setting: Any, checkpoint: str | None) -> None:
    """Refuse a checkpoint of a sharded model for a strategy that does not read one, and one that cannot predict."""
    path = setting.get("class_path") if hasattr(setting, "get") else setting
    # A short name, such as ddp, is one of Lightning's.
    strategy = named_class("trainer.strategy", path, (Strategy,)) if "." in str(path) else Strategy
    if subcommand == "predict" and not getattr(strategy, "predicts", True):
        reason = "is not allowed for predict, where devices get unequal shares"
        hint = "predict with a model that lrsa export has written, on one device or with configs/trainer/ddp.yaml"
        raise UserError("trainer.strategy", strategy.__name__, reason=reason, hint=hint)
    if subcommand == "fit" and not getattr(strategy, "trains", True):
        raise UserError("trainer.strategy", strategy.__name__, hint="it is for validate, test and predict alone")
    if checkpoint is not None and holds_shards(Path(checkpoint)) and not getattr(strategy, "reads_shards", False):
        reason = "is of a sharded model, which trainer.strategy is not for"
        hint = "add --config configs/trainer/fsdp.yaml, or make it a model for model.backbone.source with lrsa export"
        raise UserError("ckpt_path", checkpoint, reason=reason, hint=hint)


def check_model(task: LongContextQA) -> None:
    """Refuse, by its config alone, a model that cannot carry the rule, and rules for other layers than it has."""
    config = task.backbone.config
    with under("model.backbone"):
        task.backbone.check_low_rank()
    check_config(config)
    task.check_layers(config.num_hidden_layers, heads_of(config))


def check_pairs(task: LongContextQA, data: QADataModule) -> None:
    """Refuse an objective that compares answers where the data has one of each."""
    for term in task.objective.terms:
        if term.needs_rejected and not data.rejects:
            reason = f"{type(term).__name__} needs two answers to each prompt, and {type(data).__name__} has one"
            raise UserError("model.objective", reason=reason, hint="take data such as lrsa_lit.data.PreferencePairs")


def check_context(task: LongContextQA, data: QADataModule, strategy: Strategy) -> None:
    """Refuse what devices that share rows cannot train."""
    if not isinstance(strategy, FullySharded) or strategy.context == 1:
        return
    with under("trainer.strategy.init_args"):
        check_shareable(task.train_config, task.objective, task.backbone.config)
        rule, packing = (task.train_config or task.lrsa).rule, data.packing
        if packing is not None and packing.tokens < shortest_row(strategy.context, rule):
            raise too_short(packing.tokens, strategy.context, rule, "data.init_args.packing.tokens is")


def check_rows(task: LongContextQA, data: QADataModule, strategy: Strategy) -> None:
    """Refuse prepared examples that are too short for devices to share them; packed ones make rows of a length."""
    if not isinstance(strategy, FullySharded) or strategy.context == 1 or isinstance(data.policy, Packed):
        return
    data.setup("fit")
    rule, lengths = (task.train_config or task.lrsa).rule, token_cache.longest(data.open_split("train"))
    shortest = max(min(lengths), data.policy.row_length(lengths))
    if shortest < shortest_row(strategy.context, rule):
        with under("trainer.strategy.init_args"):
            raise too_short(shortest, strategy.context, rule, "the shortest training example has")


def check_positions(task: LongContextQA, data: QADataModule) -> None:
    """Refuse examples that are longer than the model has positions, answers included; digests take fewer."""
    backbone, new = task.backbone, task.max_new_tokens
    positions = getattr(backbone.config, "max_position_embeddings", None) or sys.maxsize
    needed = new + (data.max_tokens if task.digests is None else task.digests.longest(data.max_tokens))
    if needed > positions:
        has = f"{backbone.name} has {positions} positions and model.max_new_tokens takes {new} of them"
        more = f"model.backbone.rope_scaling: {{rope_type: yarn, factor: {math.ceil(needed / positions)}}}"
        raise UserError("data.init_args.max_tokens", data.max_tokens, hint=f"{has}; more are had by {more}")


def check_digests(subcommand: str, digests: Digests, data: QADataModule) -> None:
    """Refuse digests for what gives no answers from them, and packed examples."""
    if subcommand == "predict" and digests.stage == "repeat":
        raise UserError("model.digests.init_args.stage", "repeat", "answer for predict")
    if data.packing is not None:
        raise UserError("data.init_args.packing", reason="is not allowed beside model.digests", allowed="null")


def check_contexts(subcommand: str, task: LongContextQA, data: QADataModule) -> None:
    """Refuse prepared data some of whose examples cannot be digested, or are too long with digests."""
    if task.digests is None:
        return
    data.setup(subcommand)
    for split in SPLITS:
        for size in token_cache.sizes(data.open_split(split)) if split in data.report else ():
            task.digests.check_size(size, task.max_new_tokens)


def check_parts_of_data(subcommand: str, task: LongContextQA, data: QADataModule) -> None:
    """Refuse attentions that are named as a data set or task of the prepared data."""
    split = {"fit": "val", "validate": "val", "test": "test"}.get(subcommand)
    if split in data.splits():
        data.setup(subcommand)
        with under("model"):
            check_names(task.attentions, data.groups(split))


def root_folder(trainer: Any) -> Path:
    """The folder of runs, whose ~ is made a folder for all that read the setting."""
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
    """Refuse a command without a batch, intervals of no batch, and more processes on a CPU than it has cores."""
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
    """Refuse loggers whose package is not installed, which Lightning would say from within a wall of settings."""
    for logger in setting if isinstance(setting, list) else [setting]:
        name = str(getattr(logger, "get", lambda _: "")("class_path")).rpartition(".")[2]
        packages = _OF_LOGGERS.get(name, ())
        if packages and not any(importlib.util.find_spec(package) for package in packages):
            reason = f"{name} needs {packages[0]}, which is not installed"
            raise UserError("trainer.logger", reason=reason, hint="pip install 'lrsa-lit[loggers]'")


def note_environment() -> None:
    """Name the variables that LightningCLI or a Trainer would read as settings: here files and flags alone decide."""
    prefixes = ("PL_TRAINER_", *(f"PL_{command}__" for command in ("FIT", "VALIDATE", "TEST", "PREDICT")))
    if ignored := sorted(name for name in os.environ if name.startswith(prefixes)):
        _log.warning("Not read from the environment: %s; settings are given by --config and flags", ", ".join(ignored))


def quiet_libraries() -> None:
    """Log this project's lines through rich; silence what no user can act on."""
    log_to()
    # Of several processes one says what all of them do.
    first = all(os.environ.get(name, "0") == "0" for name in ("RANK", "LOCAL_RANK", "NODE_RANK"))
    if not first:
        logging.getLogger("lrsa_lit").setLevel(logging.WARNING)
    # Lightning's start-up hints, and retries whose outcome is raised or said anyway.
    hints = "lightning.pytorch.utilities.rank_zero", "lightning.pytorch.accelerators.cuda"
    for name in (*hints, "urllib3.connectionpool", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.ERROR)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for pattern in _NOISE:
        warnings.filterwarnings("ignore", message=pattern)
