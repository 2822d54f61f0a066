"""The LightningCLI subclass: the links between the parts, and mistakes told in one line."""

from __future__ import annotations

import logging
import math
import shlex
import sys
from collections.abc import Callable, Sequence
from inspect import signature
from pathlib import Path
from typing import Any, Literal

import yaml
from jsonargparse import set_parsing_settings
from lightning.fabric.plugins import CheckpointIO
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import (
    BasePredictionWriter,
    BatchSizeFinder,
    Checkpoint,
    LearningRateFinder,
    ProgressBar,
)
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.utilities.exceptions import SIGTERMException
from omegaconf.errors import OmegaConfBaseException
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lrsa_lit.analysis.gates import GatesRecord
from lrsa_lit.callbacks import (
    FitSummary,
    MonitoredMetrics,
    ValidationDuration,
    show_answers,
    show_evaluation,
    show_next,
)
from lrsa_lit.checkpoints import AtomicCheckpointIO, CheckedForm, ExactState, FiniteLoss, GracefulStop, resume
from lrsa_lit.checkpoints.checkpoint_io import claim
from lrsa_lit.checkpoints.safe_model_checkpoint import last_good
from lrsa_lit.classes import argument_kinds, check_classes
from lrsa_lit.cli import preflight
from lrsa_lit.cli.settings_parser import DATA_TOKENIZER, TOKENIZER, OneLineParser, first_user_error, one_line
from lrsa_lit.data.loaders import check_steps
from lrsa_lit.data.module import QADataModule
from lrsa_lit.errors import UserError, under
from lrsa_lit.lightning_internals import OpenCLI, counts_before_shares
from lrsa_lit.objectives import Objective
from lrsa_lit.ops.sparse_attention import Compressor
from lrsa_lit.paths import check_writable, expanded
from lrsa_lit.strategies import shards_weights
from lrsa_lit.systems import System
from lrsa_lit.tasks import HeadGates, LongContextQA, TopKSchedule
from lrsa_lit.tasks.measures import at_budgets
from lrsa_lit.terminal import PlainConsole
from lrsa_lit.tracking import RecordConfig
from lrsa_lit.tracking.logger import mlflow_run
from lrsa_lit.uris import register

_log = logging.getLogger("lrsa_lit")
# What settings make objects of, and where a parser that knows no type would make any.
_OF_TRAINER = (kind for name in signature(Trainer).parameters for kind in argument_kinds(Trainer, name))
_KINDS = (
    *{kind for kind in _OF_TRAINER if kind.__module__.startswith("lightning.")},
    *(QADataModule, Optimizer, LRScheduler, TopKSchedule, Compressor, System, Objective, HeadGates),
)
_OF_RULES = (Compressor, System)
_SLOTS = {"model.evaluate": _OF_RULES, "model.train_attention": _OF_RULES, "model.lr_scheduler": (LRScheduler,)}
_SWITCHES = {"enable_progress_bar": ProgressBar, "enable_checkpointing": Checkpoint}


class LRSACLI(OpenCLI):
    """Links the model's tokenizer to the data, and validates before training; takes a subcommand and its arguments."""

    def __init__(self, arguments: Sequence[str]) -> None:
        self._asked, self._arguments = arguments[0], arguments
        register()
        set_parsing_settings(omegaconf_absolute_to_relative_paths=True)
        super().__init__(
            LongContextQA,
            QADataModule,
            args=list(arguments),
            subclass_mode_data=True,
            save_config_callback=RecordConfig,
            save_config_kwargs={"command": self._asked},
            seed_everything_default=0,
            parser_class=OneLineParser,
            # "omegaconf+" resolves ${…} after all files and flags are merged; "omegaconf" would ignore overrides.
            # Beginnings of names would pass for misspelt ones.
            parser_kwargs={"parser_mode": "omegaconf+", "allow_abbrev": False},
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
        )

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """The one that is asked for: the parser of each takes as long to build as that of all settings."""
        return {self._asked: super().subcommands()[self._asked]}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Settings and links beyond Lightning's own."""
        add = parser.add_argument
        first = "Validate before training, so that a fit shows its gain."
        add("--validate_first", type=bool, default=True, help=first)
        best = "The score of validations that decides the best checkpoint and early stopping."
        add("--best_by", type=Literal["f1", "em", "recall", "loss"], default="f1", help=best)
        add("--estimate", action="store_true", help="Say what memory and time the fit will take, and do not start it.")
        plugins = "Modules of yours, which add data sets, compressors, systems or objectives."
        add("--plugins", type=list[str] | str, default=[], help=plugins)
        if self._asked in ("validate", "test", "predict"):
            of = "each attention evaluated, dense aside, by the largest K or size of its system whose cache is no more"
            add("--budget", type=float | None, default=None, help=f"Set {of} than this share of that of max_tokens.")
            add("--cache_tokens", "--cache-tokens", type=int | None, default=None, help="The same in tokens.")
        parser.link_arguments(TOKENIZER, DATA_TOKENIZER, apply_on="instantiate")

    def adapt(self, parser: LightningArgumentParser, subcommand: str) -> None:
        """Lightning's list of all metrics only on request: an evaluation closes with a table of its own."""
        counts_before_shares(parser)
        if subcommand in ("validate", "test"):
            parser.set_defaults(verbose=False)

    def before_instantiate_classes(self) -> None:
        """Check what a run reads and writes before anything is loaded."""
        check_classes("", self.config[str(self.subcommand)].as_dict(), _KINDS, _SLOTS, LongContextQA)
        if self.asked("model.lrsa") is None:
            raise UserError("model.lrsa", "null", hint="set model.train_attention to null for dense training")
        trainer = self.asked("trainer")
        preflight.check_amounts(str(self.subcommand), trainer)
        preflight.check_loggers(trainer.get("logger"))
        # What decides the weights, for checkpoints to be compared with.
        self.settings = resume.settings_of(yaml.safe_load(self.dumped()))
        if self.instead():
            # It leaves no trace of a run.
            trainer.logger, trainer.callbacks = False, []
            return
        folder = preflight.root_folder(trainer)
        self._choose_checkpoint(folder)
        preflight.check_strategy(str(self.subcommand), trainer.get("strategy"), self.asked("ckpt_path"))
        check_writable("trainer.default_root_dir", folder, folder)
        precision = str(trainer.get("precision") or "")
        if precision in ("bf16-true", "16-true"):
            # It would round the rotary frequencies too, and with them the long positions.
            raise UserError("trainer.precision", precision, hint="use model.backbone.dtype instead")

    def instantiate_classes(self) -> None:
        """Build the parts; what their constructors complain about is the user's to mend."""
        try:
            super().instantiate_classes()
        except (TypeError, ValueError) as error:
            raise first_user_error(error) or UserError(one_line(str(error))) from error

    def after_instantiate_classes(self) -> None:
        """Check what two parts must agree on, and prepare the data, before the run is recorded."""
        config, model = self.model.backbone.config, self.model
        preflight.check_model(model)
        if self.subcommand != "fit":
            asked = {"share": self.asked("budget"), "cache_tokens": self.asked("cache_tokens")}
            model.attentions = at_budgets(model.attentions, model.backbone, self.datamodule.max_tokens, **asked)
            model.lrsa = model.attentions[""]
        positions = getattr(config, "max_position_embeddings", None) or sys.maxsize
        needed = self.datamodule.max_tokens + model.max_new_tokens
        if needed > positions:
            has = f"{model.backbone.name} has {positions} positions and model.max_new_tokens takes"
            more = f"model.backbone.rope_scaling: {{rope_type: yarn, factor: {math.ceil(needed / positions)}}}"
            hint = f"{has} {model.max_new_tokens} of them; more are had by {more}"
            raise UserError("data.init_args.max_tokens", self.datamodule.max_tokens, hint=hint)
        if self.instead():
            return
        if model.generate_answers or self.subcommand == "predict":
            self.datamodule.check_answers(str(self.subcommand))
        if self.asked("ckpt_path") is not None and model.head_gates is None:
            # It has all weights that were trained; beside gates there are none in it.
            model.start_from = None
        model.start()
        if self.subcommand == "fit":
            model.check_training()
            model.check_objective(self.datamodule.max_tokens)
            preflight.check_pairs(model, self.datamodule)
            self._open_teachers()
            self._check_optimizer()
        self._check_callbacks()
        if self.trainer.is_global_zero:
            self.datamodule.prepare_data(self.subcommand)
        checkpoint = self.asked("ckpt_path")
        if self.subcommand == "fit" and checkpoint is not None:
            self._take_up(Path(checkpoint))

    def instead(self) -> Callable[[], None] | None:
        """What is done in place of the run, if anything is."""
        if not self.asked("estimate"):
            return None
        if self.subcommand != "fit":
            raise UserError("--estimate", reason=f"it is not allowed for {self.subcommand}; only a fit is estimated")
        return self._estimate

    def _open_teachers(self) -> None:
        try:
            self.model.open_teachers(self.datamodule)
        except UserError as error:
            if error.field.startswith("objective."):
                # The first arguments name the command and the shipped defaults.
                error.hint = f"it is made by: lrsa distil-cache {shlex.join(self._arguments[3:])}"
            raise

    def _take_up(self, checkpoint: Path) -> None:
        """Go on with the run of a checkpoint, if it is the same run and nobody else has gone on with it."""
        found, logger = resume.about(checkpoint), mlflow_run(self.trainer)
        same = resume.check_continues(checkpoint, found, self.settings, self.trainer.world_size)
        if logger is not None and not (found.run and logger.continue_run(found.run, found.step, same)):
            return
        if self.trainer.is_global_zero and not claim(checkpoint.parent):
            reason = f"{checkpoint} belongs to a run that another process is writing; wait until it has ended"
            raise UserError("ckpt_path", reason=reason)

    def _check_callbacks(self) -> None:
        """Let callbacks check what they will need: Lightning asks them for the first time when the run is open."""
        callbacks = self.trainer.callbacks  # type: ignore[attr-defined]
        if self.subcommand == "predict" and not any(isinstance(each, BasePredictionWriter) for each in callbacks):
            reason = "predict needs lrsa_lit.callbacks.PredictionWriter, which keeps the answers"
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
        """Check the checkpoint that was named, or find the one that is meant."""
        options = self.config[str(self.subcommand)]
        path = options.get("ckpt_path")
        if path != resume.LAST:
            if path is not None:
                options["ckpt_path"] = str(resume.named(expanded("ckpt_path", path)))
            return
        fit = self.subcommand == "fit"
        found = resume.last(self._run_folders(root), self.settings, "" if fit else "model.backbone")
        if found is None and not fit:
            raise UserError("ckpt_path", reason=f"{resume.LAST} finds no checkpoint of this model under {root}")
        _log.info("ckpt_path: %s", found or "no checkpoint to resume from yet, so this is a new run")
        options["ckpt_path"] = found and str(found)

    def _run_folders(self, root: Path) -> list[Path]:
        """Where runs of this configuration save their checkpoints."""
        callbacks = self.asked("trainer").get("callbacks") or []
        named = [(callback.get("init_args") or {}).get("dirpath") for callback in callbacks]
        return [root / "checkpoints", *root.glob("*/*/checkpoints"), *(Path(path) for path in named if path)]

    def build_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> Trainer:
        """Add what every run has, and leave out of a fit what looks at validations by themselves."""
        self.graceful_stop = GracefulStop()
        # The defaults have callbacks of both kinds, which Lightning refuses where they are switched off.
        off = [kind for name, kind in _SWITCHES.items() if config.get(name) is False]
        config["callbacks"] = [each for each in _as_list(config.get("callbacks")) if not isinstance(each, tuple(off))]
        plugins = _as_list(config.get("plugins"))
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            config["plugins"] = [*plugins, AtomicCheckpointIO()]
        always = [CheckedForm(), ExactState(self.settings), FiniteLoss(), self.graceful_stop]
        if self.asked("model.head_gates") is not None:
            always.append(GatesRecord())
        try:
            trainer = super().build_trainer(config, [*callbacks, *always])
        except (MisconfigurationException, ImportError, TypeError, ValueError) as error:
            # ImportError: the library of an accelerator, a strategy or a profiler is not installed.
            raise first_user_error(error) or UserError("trainer", reason=one_line(str(error))) from error
        if self.asked("model.head_gates") is not None and shards_weights(trainer.strategy):
            raise UserError("trainer.strategy", reason="cannot train model.head_gates where the model is sharded")
        if self.subcommand == "fit":
            kept = [each for each in trainer.callbacks if not getattr(each, "only_validates", False)]  # type: ignore[attr-defined]
            trainer.callbacks = [MonitoredMetrics(), ValidationDuration(), *kept]  # type: ignore[attr-defined]
        return trainer

    def run_subcommand(self, subcommand: str) -> None:
        """Run it; after Ctrl-C or SIGTERM say where the run can be taken up again."""
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
            how = f"; go on with --ckpt_path {saved}" if saved else ""
            what, code = ("terminated", 143) if isinstance(error, SIGTERMException) else ("interrupted", 130)
            if self.trainer.is_global_zero:
                print(f"lrsa: {what}{at}{how}", file=sys.stderr)
            raise SystemExit(code) from None

    def _estimate(self) -> None:
        from lrsa_lit.cli.estimate import estimate

        PlainConsole().print(estimate(self.model, self.datamodule, self.trainer, self.asked("trainer")))

    def before_fit(self) -> None:
        """Validate at step 0; a resumed run has done so."""
        self.model.logs_measures = False
        if self.asked("validate_first") and self.asked("ckpt_path") is None:
            self._validate()
            self._reopen()

    def after_fit(self) -> None:
        """Close with what the training changed, validating once more if it went on after the last validation."""
        callbacks = self.trainer.callbacks  # type: ignore[attr-defined]
        if summary := next((each for each in callbacks if isinstance(each, FitSummary)), None):
            if not summary.history or summary.history[-1][0] != self.trainer.global_step:
                self._reopen()
                self._validate()
            summary.show(self.trainer)
            self._show_next()

    def _show_next(self) -> None:
        """The commands that go on with the checkpoint of a fit."""
        saved = self.trainer.checkpoint_callback
        path = getattr(saved, "best_model_path", "") or getattr(saved, "last_model_path", "")
        if path and self.trainer.is_global_zero:
            # The first arguments name the command and the shipped defaults.
            show_next(path, self._arguments[3:], tests="test" in self.datamodule.splits())

    def after_validate(self) -> None:
        """Close with the scores, part by part."""
        show_evaluation(self.trainer, self.model, self.datamodule, "val")

    def after_test(self) -> None:
        """Close with the scores, part by part."""
        show_evaluation(self.trainer, self.model, self.datamodule, "test")

    def after_predict(self) -> None:
        """Close with where the answers are."""
        show_answers(self.trainer)

    def _reopen(self) -> None:
        """Lightning closes the run after each stage; another one follows."""
        if (run := mlflow_run(self.trainer)) is not None:
            run.reopen()

    def _validate(self) -> None:
        if "val" in self.datamodule.splits():
            self.trainer.validate(self.model, datamodule=self.datamodule, verbose=False)


def _as_list(setting: Any) -> list[Any]:
    return setting if isinstance(setting, list) else [setting] if setting else []


def run(arguments: Sequence[str]) -> None:
    """Parse and run one subcommand; a mistake in the arguments or files is a UserError."""
    run_with(LRSACLI, arguments)


def run_with(cli: Callable[[Sequence[str]], object], arguments: Sequence[str]) -> None:
    """The same, with a command line of one's own."""
    preflight.quiet_libraries()
    preflight.note_environment()
    try:
        cli(arguments)
    except (OmegaConfBaseException, MisconfigurationException) as error:
        raise first_user_error(error) or UserError(one_line(str(error))) from error
    except ValueError as error:
        raise first_user_error(error) or error from None


def parser_of(command: str) -> OneLineParser:
    """The parser of a subcommand's settings, which runs nothing."""
    preflight.quiet_libraries()
    try:
        _ParserAlone([command])
    except _ParserBuilt as built:
        parser: OneLineParser = built.args[0]
        return parser
    raise AssertionError("the parser was not asked for its arguments")


class _ParserBuilt(Exception):  # noqa: N818 - no error
    pass


class _ParserAlone(LRSACLI):
    def parse_arguments(self, parser: OneLineParser, args: Any) -> None:  # type: ignore[override]
        raise _ParserBuilt(parser)
