"""The command line of sentence retrieval: sentence encoders, by which the filter CPC ranks sentences."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence

from lrsa_lit.attention.families import check_config
from lrsa_lit.callbacks import show_recalls
from lrsa_lit.cli.lightning_cli import run_with
from lrsa_lit.cli.run_cli import RunCLI
from lrsa_lit.data.supporting_facts import SentenceData
from lrsa_lit.errors import UserError, redacted
from lrsa_lit.tasks import SentenceRetrieval
from lrsa_lit.terminal import PlainConsole


class SentenceCLI(RunCLI):
    """Trains and evaluates SentenceRetrieval on SentenceData."""

    task = SentenceRetrieval
    data = SentenceData

    def check_settings(self) -> None:
        """Refuse predict, because nothing is generated, and any score but recall."""
        if self.subcommand == "predict":
            raise UserError("task", self.asked("task"), "question_answering", reason="has no answers to predict")
        if (score := self.asked("best_by")) != "recall":
            raise UserError("best_by", score, "recall")

    def check_parts(self) -> None:
        """Check that the model works without a causal mask, and has enough positions and a mask token."""
        model, config = self.model, self.model.backbone.config
        check_config(config)
        positions = getattr(config, "max_position_embeddings", None) or sys.maxsize
        if model.max_tokens > positions:
            raise UserError("model.max_tokens", model.max_tokens, f"at most {positions}, as {model.backbone.name} has")
        if self.datamodule.max_tokens > model.max_tokens:
            allowed = f"at most model.max_tokens ({model.max_tokens}): a training context is read in one pass"
            raise UserError("data.init_args.max_tokens", self.datamodule.max_tokens, allowed)
        if self.subcommand == "fit":
            _ = model.mask_id

    def needs_whole_weights(self) -> str:
        """A sentence encoder needs whole weights, because states are taken from inside the model."""
        return "a sentence encoder"

    def show_next(self, checkpoint: str, arguments: Sequence[str]) -> None:
        """Print the commands of the test and of the filter."""
        console = PlainConsole()
        console.say(f"Best checkpoint: {checkpoint}")
        console.say(f"Test it: {redacted(shlex.join(['lrsa', 'test', *arguments, '--ckpt_path', checkpoint]))}")
        console.say(f"Filter by it: --data.init_args.filter CPC --data.init_args.filter.checkpoint {checkpoint}")

    def after_validate(self) -> None:
        """Print the recalls."""
        show_recalls(self.trainer, "val")

    def after_test(self) -> None:
        """Print the recalls."""
        show_recalls(self.trainer, "test")


def run(arguments: Sequence[str]) -> None:
    """Parse and run one subcommand; a mistake in the arguments or files is a UserError."""
    run_with(SentenceCLI, arguments)
