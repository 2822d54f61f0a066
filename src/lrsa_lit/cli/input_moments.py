"""``lrsa input-moments --to FILE …``, with the arguments of ``lrsa fit``: measure moments of attention inputs.

``model.backbone.low_rank.whitening`` then takes the file.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import ClassVar

from lrsa_lit.cli.arguments import LARGEST, Parser, integer
from lrsa_lit.cli.fit_tool import FitTool, run_tool
from lrsa_lit.errors import UserError
from lrsa_lit.models import uncompiled, whitening
from lrsa_lit.terminal import PlainConsole


def run(arguments: Sequence[str]) -> None:
    """Run the command; a mistake in the arguments or files is a UserError."""
    parser = Parser("lrsa input-moments", add_help=False)
    parser.add_argument("--to", metavar="FILE")
    parser.add_argument("--contexts", type=integer(1, LARGEST), default=8)
    parser.add_argument("--tokens", type=integer(1, LARGEST), default=512)
    run_tool(_InputMoments, parser, arguments)


class _InputMoments(FitTool):
    """Runs the model over the first prompts of the training split.

    Each is cut to its first tokens. The model is the one that a fit would start from, with dense attention.
    """

    command = "input-moments"
    needed: ClassVar[dict[str, str]] = {"to": "the file that the moments are written to"}

    def check(self) -> None:
        """Refuse a model with low-rank factors and an output file that cannot be written."""
        if self.asked("model.backbone.low_rank") is not None:
            reason = "is not allowed: moments are measured before keys and values are factored"
            raise UserError("model.backbone.low_rank", reason=reason, hint="leave it out here")
        self.file()

    def work(self) -> None:
        """Measure the moments and write them."""
        task, data, trainer, path = self.model, self.datamodule, self.trainer, self.file()
        data.prepare_split("train")
        examples, most = data.open_split("train"), self.own.tokens
        wanted = range(min(self.own.contexts, len(examples)))
        chosen = map(examples.__getitem__, wanted)
        contexts = [example["input_ids"][: min(example["prompt_length"], most)] for example in chosen]
        model = task.start().build().to(trainer.strategy.root_device)
        with trainer.precision_plugin.forward_context(), uncompiled():
            found = whitening.measure(model, contexts, track=self.shown("Reading contexts"))
        whitening.write(path, found)
        say = PlainConsole().say
        layers, width, _ = found.shape
        tokens = sum(map(len, contexts))
        read = f"{len(contexts)} contexts of {tokens:,} tokens"
        say(f"Moments of the inputs of {layers} layers, of width {width}, over {read} are in {path}")
        use = ["--model.backbone.low_rank.ratio", "0.5", "--model.backbone.low_rank.whitening", str(path)]
        say(f"Use them: lrsa fit or lrsa test with {shlex.join(use)}")
