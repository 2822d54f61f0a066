"""``lrsa input-moments --to FILE …``, with the arguments of ``lrsa fit``: measure what keys and values are made of.

``model.backbone.low_rank.whitening`` then takes the file.
"""

from __future__ import annotations

import argparse
import functools
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.progress import track

from lrsa_lit.cli.arguments import LARGEST, Parser, integer
from lrsa_lit.cli.lightning_cli import LRSACLI, run_with
from lrsa_lit.cli.main import prepared
from lrsa_lit.errors import UserError
from lrsa_lit.models import uncompiled, whitening
from lrsa_lit.paths import check_writable, expanded
from lrsa_lit.terminal import PlainConsole


def run(arguments: Sequence[str]) -> None:
    """Run the command; a mistake in the arguments or files is a UserError."""
    parser = Parser("lrsa input-moments", add_help=False)
    parser.add_argument("--to", metavar="FILE")
    parser.add_argument("--contexts", type=integer(1, LARGEST), default=8)
    parser.add_argument("--tokens", type=integer(1, LARGEST), default=512)
    own, others = parser.parse_known_args(arguments)
    told = prepared("fit", others)
    run_with(functools.partial(_InputMoments, own), told)


class _InputMoments(LRSACLI):
    """Parses and checks as a fit does, and runs the model over the first prompts of the training split, on one device.

    Each is cut to its first tokens. The model is the one that a fit would begin with, with dense attention.
    """

    def __init__(self, own: argparse.Namespace, arguments: Sequence[str]) -> None:
        self.own = own
        super().__init__(arguments)

    def instead(self) -> Callable[[], None] | None:
        """The measurement."""
        if self.asked("estimate"):
            raise UserError("--estimate", reason="it is not allowed for input-moments; only a fit is estimated")
        if self.own.to is None:
            raise UserError("--to", reason="it is needed: the file that the moments are written to")
        if self.asked("model.backbone.low_rank") is not None:
            reason = "is not allowed: moments are of a model whose keys and values are not factored yet"
            raise UserError("model.backbone.low_rank", reason=reason, hint="leave it out here")
        path = expanded("--to", self.own.to)
        check_writable("--to", path, path.absolute().parent)
        return functools.partial(self._write, path)

    def _write(self, path: Path) -> None:
        task, data, trainer = self.model, self.datamodule, self.trainer
        if not trainer.is_global_zero:
            return
        data.prepare_split("train")
        examples, most = data.open_split("train"), self.own.tokens
        wanted = range(min(self.own.contexts, len(examples)))
        chosen = map(examples.__getitem__, wanted)
        contexts = [example["input_ids"][: min(example["prompt_length"], most)] for example in chosen]
        console = PlainConsole(stderr=True)
        shown = functools.partial(track, description="Reading contexts", console=console, transient=True,
                                  disable=not console.is_terminal)  # fmt: skip
        model = task.start().build().to(trainer.strategy.root_device)
        with trainer.precision_plugin.forward_context(), uncompiled():
            found = whitening.measure(model, contexts, track=shown)
        whitening.write(path, found)
        say = PlainConsole().say
        layers, width, _ = found.shape
        tokens = sum(map(len, contexts))
        read = f"{len(contexts)} contexts of {tokens:,} tokens"
        say(f"Moments of the inputs of {layers} layers, of width {width}, over {read} are in {path}")
        use = ["--model.backbone.low_rank.ratio", "0.5", "--model.backbone.low_rank.whitening", str(path)]
        say(f"Use them: lrsa fit or lrsa test with {shlex.join(use)}")
