"""The command line of question answering, which is the default task of a run."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from lightning.pytorch.cli import LightningArgumentParser
from omegaconf.errors import OmegaConfBaseException
from torch.optim.lr_scheduler import LRScheduler

from lrsa_lit import plugins
from lrsa_lit.analysis.gates import GatesRecord
from lrsa_lit.callbacks import show_answers, show_evaluation, show_next
from lrsa_lit.classes import Kinds
from lrsa_lit.cli import preflight
from lrsa_lit.cli.run_cli import RunCLI
from lrsa_lit.cli.settings_parser import OneLineParser, first_user_error, one_line
from lrsa_lit.data.module import QADataModule
from lrsa_lit.errors import UserError
from lrsa_lit.models.checkpoint import holds_factors
from lrsa_lit.objectives import Objective
from lrsa_lit.ops.sparse_attention import Compressor
from lrsa_lit.systems import System
from lrsa_lit.tasks import Digests, HeadGates, LongContextQA, SoCo, TopKSchedule
from lrsa_lit.tasks.measures import at_budgets
from lrsa_lit.terminal import PlainConsole

_OF_RULES = (Compressor, System)


class LRSACLI(RunCLI):
    """Trains and evaluates LongContextQA on a QADataModule."""

    task = LongContextQA
    data = QADataModule
    kinds: ClassVar[Kinds] = (TopKSchedule, Compressor, System, Objective, HeadGates, SoCo, Digests)
    slots: ClassVar[dict[str, Kinds]] = {
        "model.evaluate": _OF_RULES,
        "model.train_attention": _OF_RULES,
        "model.lr_scheduler": (LRScheduler,),
    }

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add settings that only this task's runs have."""
        super().add_arguments_to_parser(parser)
        add = parser.add_argument
        add("--estimate", action="store_true", help="Estimate the memory and time of the fit, and do not start it.")
        if self.arguments[0] in ("validate", "test", "predict"):
            of = "for each evaluated attention but dense the largest K, or size of its system, whose cache is at most"
            add("--budget", type=float | None, default=None, help=f"Use {of} this share of a dense one of max_tokens.")
            add("--cache_tokens", "--cache-tokens", type=int | None, default=None, help="The same limit in tokens.")

    def check_settings(self) -> None:
        """Refuse a null rule, because evaluations use the rule even if training does not."""
        if self.asked("model.lrsa") is None:
            raise UserError("model.lrsa", "null", hint="set model.train_attention to null for dense training")

    def check_parts(self) -> None:
        """Check that the model supports its rules and has positions for the longest example."""
        model = self.model
        preflight.check_model(model)
        if self.subcommand != "fit":
            asked = {"share": self.asked("budget"), "cache_tokens": self.asked("cache_tokens")}
            model.attentions = at_budgets(model.attentions, model.backbone, self.datamodule.max_tokens, **asked)
            model.lrsa = model.attentions[""]
        preflight.check_positions(model, self.datamodule)
        if model.digests is not None:
            if self.instead():
                raise UserError(
                    "model.digests", reason="works only with fit (not --estimate), validate, test and predict"
                )
            preflight.check_digests(str(self.subcommand), model.digests, self.datamodule)

    def check_beginning(self) -> None:
        """Check what is there: answers to generate, weights to start from and, for a fit, something to train."""
        model = self.model
        if model.generate_answers or self.subcommand == "predict":
            self.datamodule.check_answers(str(self.subcommand))
        checkpoint = self.asked("ckpt_path")
        if checkpoint is not None and model.head_gates is None:
            # The checkpoint has all trained weights, and only it has the ranks of factors. With gates, it has no
            # weights of the model.
            narrow = model.spectra is None and holds_factors(Path(checkpoint))
            model.start_from = checkpoint if narrow else None
        model.start()
        if self.subcommand == "fit":
            model.check_training()
            model.check_objective(self.datamodule.max_tokens, self.trainer.max_steps)
            preflight.check_pairs(model, self.datamodule)
            preflight.check_context(model, self.datamodule, self.trainer.strategy)
            self._open_teachers()

    def check_examples(self) -> None:
        """Check that no part of the data has the name of an attention, and that examples have suitable lengths."""
        preflight.check_parts_of_data(str(self.subcommand), self.model, self.datamodule)
        preflight.check_contexts(str(self.subcommand), self.model, self.datamodule)
        if self.subcommand == "fit":
            preflight.check_rows(self.model, self.datamodule, self.trainer.strategy)

    def instead(self) -> Callable[[], None] | None:
        """Return the estimate of a fit if it is asked for."""
        if not self.asked("estimate"):
            return None
        if self.subcommand != "fit":
            raise UserError("--estimate", reason=f"it is not allowed for {self.subcommand}; only a fit is estimated")
        return self._estimate

    def _estimate(self) -> None:
        from lrsa_lit.cli.estimate import estimate

        PlainConsole().print(estimate(self.model, self.datamodule, self.trainer, self.asked("trainer")))

    def _open_teachers(self) -> None:
        try:
            self.model.open_teachers(self.datamodule)
        except UserError as error:
            if error.field.startswith("objective."):
                error.hint = f"make it with: lrsa distil-cache {shlex.join(self.typed)}"
            raise

    def further_callbacks(self) -> list[Callback]:
        """The record of gates, if they are trained."""
        return [] if self.asked("model.head_gates") is None else [GatesRecord()]

    def needs_whole_weights(self) -> str:
        """The setting of gates, spectra or digests, if one is given; they need whole weights."""
        parts = ("model.head_gates", "model.spectra", "model.digests")
        return next((part for part in parts if self.asked(part) is not None), "")

    def before_fit(self) -> None:
        """Validate at step 0, without measures that are the same in each validation."""
        self.model.logs_measures = False
        super().before_fit()

    def show_next(self, checkpoint: str, arguments: Sequence[str]) -> None:
        """Print the commands for the test and for questions about a text."""
        rewrites = self.model.backbone.source if self.datamodule.rejects else ""
        further = {"tests": "test" in self.datamodule.splits(), "asks": self.model.digests is None}
        modules = plugins.names_of(self.asked("plugins"))
        show_next(checkpoint, arguments, rewrites=rewrites, modules=modules, **further)

    def after_validate(self) -> None:
        """Print the scores of each part of the data."""
        show_evaluation(self.trainer, self.model, self.datamodule, "val")

    def after_test(self) -> None:
        """Print the scores of each part of the data."""
        show_evaluation(self.trainer, self.model, self.datamodule, "test")

    def after_predict(self) -> None:
        """Print where the answers are."""
        show_answers(self.trainer)


def run(arguments: Sequence[str]) -> None:
    """Parse and run one subcommand; a mistake in the arguments or files is a UserError."""
    run_with(LRSACLI, arguments)


def run_with(cli: Callable[[Sequence[str]], object], arguments: Sequence[str]) -> None:
    """Like :func:`run`, with any command line."""
    preflight.quiet_libraries()
    preflight.note_environment()
    try:
        cli(arguments)
    except (OmegaConfBaseException, MisconfigurationException) as error:
        raise first_user_error(error) or UserError(one_line(str(error))) from error
    except ValueError as error:
        raise first_user_error(error) or error from None


def parser_of(command: str) -> OneLineParser:
    """The parser of a subcommand's settings; nothing is run."""
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
