"""``lrsa distil-cache …``, with the arguments of ``lrsa fit``: store a teacher's outputs for the training split.

Fits with ``cached: true`` and the same data and teacher then read these outputs in each epoch.
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
    """Runs only the teacher."""

    command = "distil-cache"

    def work(self) -> None:
        """Run the teacher over the training split and store its outputs."""
        task, data, trainer = self.model, self.datamodule, self.trainer
        distilled = [term for term in task.objective.terms if isinstance(term, Distillation)]
        if not distilled:
            raise UserError("objective", reason="has no Distillation, so there is no teacher")
        with under("objective"):
            teacher = distilled[0].as_cached()
            teacher.check(task.tokenizer)
        data.prepare_split("train")
        device, context = trainer.strategy.root_device, trainer.precision_plugin.forward_context
        folder = teacher.write(data, task.backbone.config.vocab_size, device, context)
        console = PlainConsole()
        console.say(f"The {teacher.n} most likely tokens at each position are in {folder}")
        console.say("Train with them: lrsa fit with the same arguments, and cached: true in the Distillation")
