"""``lrsa distil-cache …``, with the arguments of ``lrsa fit``: keep what the fit's teacher says of the training split.

A fit with ``cached: true`` then reads that in each of its epochs, and so do others of the same data and teacher.
"""

from __future__ import annotations

from collections.abc import Sequence

from lrsa_lit.cli.arguments import Parser
from lrsa_lit.cli.fit_tool import FitTool, run_tool
from lrsa_lit.errors import UserError, under
from lrsa_lit.objectives import Distillation
from lrsa_lit.terminal import PlainConsole


def run(arguments: Sequence[str]) -> None:
    """Run the command; a mistake in the arguments or files is a UserError."""
    run_tool(_DistilCache, Parser("lrsa distil-cache", add_help=False), arguments)


class _DistilCache(FitTool):
    """Runs the teacher alone."""

    command = "distil-cache"

    def work(self) -> None:
        """The teacher's pass."""
        task, data, trainer = self.model, self.datamodule, self.trainer
        distilled = [term for term in task.objective.terms if isinstance(term, Distillation)]
        if not distilled:
            raise UserError("objective", reason="has no Distillation, whose teacher could be kept")
        with under("objective"):
            teacher = distilled[0].as_cached()
            teacher.check(task.tokenizer)
        data.prepare_split("train")
        device, context = trainer.strategy.root_device, trainer.precision_plugin.forward_context
        folder = teacher.write(data, task.backbone.config.vocab_size, device, context)
        console = PlainConsole()
        console.say(f"The {teacher.n} likeliest tokens at each position are in {folder}")
        console.say("Train with them: the same arguments after lrsa fit, with cached: true in the Distillation")
