"""The base of all tasks' command lines: it links the parts of a run, and reports mistakes in one line."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence
from inspect import signature
from pathlib import Path
from typing import Any, ClassVar, Literal

from jsonargparse import set_parsing_settings
from lightning.fabric.plugins import CheckpointIO
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import (
    BasePredictionWriter,
    BatchSizeFinder,
    Checkpoint,
    LearningRateFinder,
    ProgressBar,
)
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lrsa_lit.callbacks import ClosingSummary, MonitoredMetrics, ValidationDuration
from lrsa_lit.checkpoints import AtomicCheckpointIO, CheckedForm, ExactState, FiniteLoss, GracefulStop, resume
from lrsa_lit.checkpoints.checkpoint_io import claim
from lrsa_lit.checkpoints.safe_model_checkpoint import last_good
from lrsa_lit.classes import Kinds, argument_kinds, check_classes
from lrsa_lit.cli import preflight
from lrsa_lit.cli.settings_parser import DATA_TOKENIZER, TOKENIZER, OneLineParser, first_user_error, one_line
from lrsa_lit.cli.task_choice import QUESTION_ANSWERING, TASKS
from lrsa_lit.data.loaders import check_steps
from lrsa_lit.errors import UserError, under
from lrsa_lit.lightning_internals import OpenCLI, counts_before_shares
from lrsa_lit.paths import check_writable, expanded, short_name
from lrsa_lit.strategies import FullySharded, shards_weights
from lrsa_lit.tracking import RecordConfig
from lrsa_lit.tracking.logger import mlflow_run
from lrsa_lit.uris import register
from lrsa_lit.yaml_file import dumped_settings

_log = logging.getLogger("lrsa_lit")
# Classes that settings may build: for settings without a type, the parser would build any class.
_OF_TRAINER = (kind for name in signature(Trainer).parameters for kind in argument_kinds(Trainer, name))
_KINDS = (
    *{kind for kind in _OF_TRAINER if kind.__module__.startswith("lightning.")},
    *(Optimizer, LRScheduler),
)
_SWITCHES = {"enable_progress_bar": ProgressBar, "enable_checkpointing": Checkpoint}


class RunCLI(OpenCLI):
    """Links the model's tokenizer to the data, and validates before training; takes a subcommand and its arguments.

    Attributes:
        task: what is trained and evaluated.
        data: the base class of its data.
        kinds: classes that settings may name, beyond those of every task.
        slots: stricter kinds for some settings, as in :func:`check_classes`.
    """

    task: ClassVar[type[LightningModule]]
    data: ClassVar[type[LightningDataModule]]
    kinds: ClassVar[Kinds] = ()
    slots: ClassVar[dict[str, Kinds]] = {"model.lr_scheduler": (LRScheduler,)}

    def __init__(self, arguments: Sequence[str]) -> None:
        self._asked, self.arguments = arguments[0], arguments
        register()
        set_parsing_settings(omegaconf_absolute_to_relative_paths=True)
        super().__init__(
            self.task,
            self.data,
            args=list(arguments),
            subclass_mode_data=True,
            save_config_callback=RecordConfig,
            save_config_kwargs={"command": self._asked},
            seed_everything_default=0,
            parser_class=OneLineParser,
            # "omegaconf+" resolves ${…} after all files and flags are merged; "omegaconf" would ignore overrides.
            # Abbreviations are not allowed, because a misspelt name could be taken for one.
            parser_kwargs={"parser_mode": "omegaconf+", "allow_abbrev": False},
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
        )

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """Only the requested subcommand, because the parser of each one takes long to build."""
        return {self._asked: super().subcommands()[self._asked]}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add settings and links beyond Lightning's own."""
        add = parser.add_argument
        add("--task", type=Literal[*TASKS], default=QUESTION_ANSWERING, help="The task to train and evaluate.")  # type: ignore[valid-type]
        first = "Validate before training, so that a fit shows its gain."
        add("--validate_first", type=bool, default=True, help=first)
        best = "The validation score that decides the best checkpoint and early stopping."
        add("--best_by", type=Literal["f1", "em", "recall", "loss"], default="f1", help=best)
        plugins = "Your modules with data sets, filters, compressors, systems or objectives."
        add("--plugins", type=list[str] | str, default=[], help=plugins)
        parser.link_arguments(TOKENIZER, DATA_TOKENIZER, apply_on="instantiate")

    def adapt(self, parser: LightningArgumentParser, subcommand: str) -> None:
        """Turn off Lightning's list of all metrics by default, because an evaluation ends with its own table."""
        counts_before_shares(parser)
        if subcommand in ("validate", "test"):
            parser.set_defaults(verbose=False)

    def before_instantiate_classes(self) -> None:
        """Check what a run reads and writes before anything is loaded."""
        kinds = (*_KINDS, *self.kinds, self.data)
        check_classes("", self.config[str(self.subcommand)].as_dict(), kinds, self.slots, self.task)
        self.check_settings()
        trainer = self.asked("trainer")
        preflight.check_amounts(str(self.subcommand), trainer)
        preflight.check_loggers(trainer.get("logger"))
        # The settings that decide the weights; checkpoints are compared with them.
        self.settings = resume.settings_of(dumped_settings(self.dumped()))
        if self.instead():
            # It must not leave traces of a run.
            trainer.logger, trainer.callbacks = False, []
            return
        folder = preflight.root_folder(trainer)
        self._choose_checkpoint(folder)
        preflight.check_strategy(str(self.subcommand), trainer.get("strategy"), self.asked("ckpt_path"))
        check_writable("trainer.default_root_dir", folder, folder)
        precision = str(trainer.get("precision") or "")
        if precision in ("bf16-true", "16-true"):
            # This would also round the rotary frequencies, and so long positions.
            raise UserError("trainer.precision", precision, hint="use model.backbone.dtype instead")

    def instantiate_classes(self) -> None:
        """Build the parts; errors of their constructors become UserErrors."""
        try:
            super().instantiate_classes()
        except (TypeError, ValueError) as error:
            raise first_user_error(error) or UserError(one_line(str(error))) from error

    def check_settings(self) -> None:
        """Check this task's own settings, before any part is built."""

    def check_parts(self) -> None:
        """Check that the task and its data fit together; also called if something else replaces the run."""

    def check_beginning(self) -> None:
        """Check what a run starts from; not called if something else replaces the run."""

    def check_examples(self) -> None:
        """Check the prepared examples, on the first process only."""

    def after_instantiate_classes(self) -> None:
        """Check that the parts fit together, and prepare the data, before the run is recorded."""
        self.check_parts()
        if self.instead():
            return
        self.check_beginning()
        if self.subcommand == "fit":
            self._check_optimizer()
        self._check_callbacks()
        if self.trainer.is_global_zero:
            self.datamodule.prepare_data(self.subcommand)
            self.check_examples()
        checkpoint = self.asked("ckpt_path")
        if self.subcommand == "fit" and checkpoint is not None:
            self._take_up(Path(checkpoint))

    def instead(self) -> Callable[[], None] | None:
        """The function that replaces the run, or None."""
        return None

    def _take_up(self, checkpoint: Path) -> None:
        """Continue the run of a checkpoint, if it is the same run and no other process continues it."""
        found, logger = resume.about(checkpoint), mlflow_run(self.trainer)
        steps = self.trainer.max_steps
        same = resume.check_continues(checkpoint, found, self.settings, self.trainer.world_size, steps)
        if 0 < steps <= found.step:
            at = f"{checkpoint} is at step {found.step}, and trainer.max_steps is {steps}"
            _log.info("%s: nothing is left to train", at)
        if logger is not None and not (found.run and logger.continue_run(found.run, found.step, same)):
            return
        if self.trainer.is_global_zero and not claim(checkpoint.parent):
            reason = f"{checkpoint} belongs to a run that another process is writing; wait until it has ended"
            raise UserError("ckpt_path", reason=reason)

    def _check_callbacks(self) -> None:
        """Let callbacks check their settings now, because Lightning first calls them after the run is recorded."""
        callbacks = self.trainer.callbacks  # type: ignore[attr-defined]
        if self.subcommand == "predict" and not any(isinstance(each, BasePredictionWriter) for each in callbacks):
            reason = "predict needs lrsa_lit.callbacks.PredictionWriter, which writes the answers"
            raise UserError("trainer.callbacks", reason=reason)
        with under("trainer"):
            check_steps(self.trainer)
        for callback in callbacks:
            if isinstance(callback, LearningRateFinder | BatchSizeFinder):
                instead = "lrsa sweep" if isinstance(callback, LearningRateFinder) else "lrsa fit --estimate"
                why = "it trains before the run begins and sets an attribute that the model does not have"
                raise UserError("trainer.callbacks", type(callback).__name__, hint=f"{why}; use {instead}")
            if (check := getattr(callback, "check_settings", None)) is not None:
                check(self.model, self.subcommand)

    def _check_optimizer(self) -> None:
        try:
            self.model.check_optimizer()
        except UserError as error:
            if error.field == "lr_scheduler" and not error.allowed:
                steps = self.asked("trainer").max_steps
                others = "give it other init_args (such as total_steps), or set model.lr_scheduler=null"
                error.reason += f"; with trainer.max_steps={steps}, {others}"
            raise

    def _choose_checkpoint(self, root: Path) -> None:
        """Check the named checkpoint, or find the last one."""
        options = self.config[str(self.subcommand)]
        path = options.get("ckpt_path")
        if path != resume.LAST:
            if path is not None:
                options["ckpt_path"] = str(resume.named(expanded("ckpt_path", path)))
            return
        fit = self.subcommand == "fit"
        prefix, steps = ("", self.asked("trainer").max_steps) if fit else ("model.backbone", None)
        found = resume.last(self._run_folders(root), self.settings, prefix, steps)
        if found is None and not fit:
            raise UserError("ckpt_path", reason=f"{resume.LAST} finds no checkpoint of this model under {root}")
        _log.info("ckpt_path: %s", found or "no checkpoint to resume from yet, so this is a new run")
        options["ckpt_path"] = found and str(found)

    def _run_folders(self, root: Path) -> list[Path]:
        """The folders where runs of this configuration save checkpoints."""
        callbacks = self.asked("trainer").get("callbacks") or []
        named = [(callback.get("init_args") or {}).get("dirpath") for callback in callbacks]
        return [root / "checkpoints", *root.glob("*/*/checkpoints"), *(Path(path) for path in named if path)]

    def build_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> Trainer:
        """Add what every run has, and leave callbacks that only validate out of a fit."""
        self.graceful_stop = GracefulStop()
        # The defaults have callbacks of both kinds, which Lightning refuses if the kind is switched off.
        off = [kind for name, kind in _SWITCHES.items() if config.get(name) is False]
        config["callbacks"] = [each for each in _as_list(config.get("callbacks")) if not isinstance(each, tuple(off))]
        plugins = _as_list(config.get("plugins"))
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            config["plugins"] = [*plugins, AtomicCheckpointIO()]
        always = [CheckedForm(), ExactState(self.settings), FiniteLoss(), self.graceful_stop, *self.further_callbacks()]
        try:
            trainer = super().build_trainer(config, [*callbacks, *always])
        except (MisconfigurationException, ImportError, TypeError, ValueError) as error:
            # ImportError: the library of an accelerator, a strategy or a profiler is not installed.
            raise first_user_error(error) or UserError("trainer", reason=one_line(str(error))) from error
        if isinstance(trainer.strategy, FullySharded):
            trainer.strategy.check_devices()
        if shards_weights(trainer.strategy) and (whole := self.needs_whole_weights()):
            raise UserError("trainer.strategy", reason=f"cannot train {whole}, because it shards the model")
        if self.subcommand == "fit":
            kept = [each for each in trainer.callbacks if not getattr(each, "only_validates", False)]  # type: ignore[attr-defined]
            trainer.callbacks = [MonitoredMetrics(), ValidationDuration(), *kept]  # type: ignore[attr-defined]
        return trainer

    def further_callbacks(self) -> list[Callback]:
        """Callbacks of this task's runs, in addition to those of every run."""
        return []

    def needs_whole_weights(self) -> str:
        """What is trained and needs weights that are not sharded; empty if there is nothing of that kind."""
        return ""

    def run_subcommand(self, subcommand: str) -> None:
        """Run it; after Ctrl-C or SIGTERM, print how to continue the run."""
        instead = self.instead()
        try:
            with self.graceful_stop.listening():
                if instead:
                    instead()
                else:
                    super().run_subcommand(subcommand)
        except SystemExit as error:
            if not (self.trainer.interrupted or instead):
                raise
            trains = subcommand == "fit" and not instead
            at = f" at step {self.trainer.global_step}" if trains else ""
            saved = last_good(self.trainer) if trains else ""
            how = f"; continue with --ckpt_path {saved}" if saved else ""
            what, code = ("terminated", 143) if isinstance(error, SIGTERMException) else ("interrupted", 130)
            if self.trainer.is_global_zero:
                print(f"lrsa: {what}{at}{how}", file=sys.stderr)
            raise SystemExit(code) from None

    def before_fit(self) -> None:
        """Validate at step 0, unless the run is resumed."""
        if self.asked("validate_first") and self.asked("ckpt_path") is None:
            self._validate()
            self._reopen()

    def after_fit(self) -> None:
        """Print what the training changed; validate once more if there were steps after the last validation."""
        callbacks = self.trainer.callbacks  # type: ignore[attr-defined]
        if summary := next((each for each in callbacks if isinstance(each, ClosingSummary)), None):
            if not summary.history or summary.history[-1][0] != self.trainer.global_step:
                self._reopen()
                self._validate()
            summary.show(self.trainer)
            self._show_next()

    def _show_next(self) -> None:
        """Print the commands that use the checkpoint of a fit."""
        saved = self.trainer.checkpoint_callback
        path = getattr(saved, "best_model_path", "") or getattr(saved, "last_model_path", "")
        if path and self.trainer.is_global_zero:
            self.show_next(path, self.typed)

    @property
    def typed(self) -> list[str]:
        """The user's arguments as they can be typed again: shipped files by their short names."""
        # The first arguments name the command and the shipped defaults.
        return list(map(short_name, self.arguments[3:]))

    def show_next(self, checkpoint: str, arguments: Sequence[str]) -> None:
        """Print commands that use a checkpoint; ``arguments`` are those of its fit."""

    def _reopen(self) -> None:
        """Reopen the recorded run, which Lightning closes after each stage, because another stage follows."""
        if (run := mlflow_run(self.trainer)) is not None:
            run.reopen()

    def _validate(self) -> None:
        if "val" in self.datamodule.splits():
            self.trainer.validate(self.model, datamodule=self.datamodule, verbose=False)


def _as_list(setting: Any) -> list[Any]:
    return setting if isinstance(setting, list) else [setting] if setting else []
