"""``lrsa token-gates --to FILE …``, with the arguments of ``lrsa fit``: fit token gates to KVzip's scores.

The compressor TokenGate then takes the file as its ``weights``.
"""

from __future__ import annotations

import functools
import shlex
from collections.abc import Sequence
from typing import ClassVar

from lrsa_lit.analysis.gate_fit import fit_token_gates
from lrsa_lit.cli.arguments import Parser
from lrsa_lit.cli.fit_tool import FitTool, run_tool
from lrsa_lit.errors import UserError
from lrsa_lit.io import write_atomically
from lrsa_lit.models import uncompiled
from lrsa_lit.ops.sparse_attention.token_gate import NAME
from lrsa_lit.terminal import PlainConsole


def run(arguments: Sequence[str]) -> None:
    """Run the command; a mistake in the arguments or files is a UserError."""
    parser = Parser("lrsa token-gates", add_help=False)
    parser.add_argument("--to", metavar="FILE")
    run_tool(_TokenGates, parser, arguments)


class _TokenGates(FitTool):
    """Fits gates to the training split's prompts."""

    command = "token-gates"
    needed: ClassVar[dict[str, str]] = {"to": "the file that the gates are written to"}

    def check(self) -> None:
        """Refuse a system, because gates choose tokens for the rule, and an output file that cannot be written."""
        if self.asked("model.lrsa.system") is not None:
            raise UserError("model.lrsa.system", reason="is not allowed: gates choose tokens in the rule's partitions")
        self.file()

    def work(self) -> None:
        """Fit the gates and write them."""
        from safetensors.torch import save

        task, data, trainer, path = self.model, self.datamodule, self.trainer, self.file()
        data.prepare_split("train")
        examples = data.open_split("train")
        contexts = [example["input_ids"][: example["prompt_length"]] for example in examples]
        model = task.start().build().to(trainer.strategy.root_device)
        encode = functools.partial(task.tokenizer.encode, add_special_tokens=False)
        rule = task.lrsa.rule
        with trainer.precision_plugin.forward_context(), uncompiled():
            fitted = fit_token_gates(model, contexts, rule, encode=encode, track=self.shown("Repeating contexts"))
        content = save({NAME: fitted.gates.contiguous()})
        write_atomically(path, lambda file: file.write(content))
        layers, heads, _ = fitted.gates.shape
        say = PlainConsole().say
        say(f"Gates of {layers} layers x {heads} heads, fitted on {fitted.fitted_on} contexts, are in {path}")
        wanted = f"the {rule.top_k} of {rule.lag_size} tokens that KVzip would keep"
        others = f"the lag-relative score {fitted.lag_relative:.1%}, chance {fitted.chance:.1%}"
        say(f"Contexts held out: {fitted.held_out}. Of {wanted} there, the gates keep {fitted.found:.1%}, {others}")
        use = ["--model.lrsa.compressor", "TokenGate", "--model.lrsa.compressor.weights", str(path)]
        say(f"Use them: lrsa fit or lrsa test with {shlex.join(use)}")
