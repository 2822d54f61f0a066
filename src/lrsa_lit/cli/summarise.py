"""``lrsa summarise --writer MODEL --to FILE …``, with the arguments of ``lrsa fit``: write summaries of passages.

The filter Summaries then shows them instead of the passages.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

from lrsa_lit.cli.arguments import Parser, add_length, kept_if_stopped
from lrsa_lit.cli.fit_tool import FitTool, run_tool
from lrsa_lit.data.filters.contexts import contexts
from lrsa_lit.data.growing_file import growing_file
from lrsa_lit.data.module import SPLITS
from lrsa_lit.data.summary_file import digest_of_text, line_of, summaries_of
from lrsa_lit.data.tokenization import token_counts
from lrsa_lit.errors import UserError, named, redacted
from lrsa_lit.models.identity import digest_of
from lrsa_lit.models.sources import trained_model
from lrsa_lit.tasks.summariser import Summariser, digest_of_summaries
from lrsa_lit.terminal import PlainConsole


def run(arguments: Sequence[str]) -> None:
    """Run the command; a mistake in the arguments or files is a UserError."""
    parser = Parser("lrsa summarise", add_help=False)
    parser.add_argument("--writer", metavar="MODEL")
    parser.add_argument("--to", metavar="FILE")
    add_length(parser)
    parser.add_argument("--splits", nargs="+", choices=SPLITS)
    run_tool(_Summarise, parser, arguments)


class _Summarise(FitTool):
    """Writes the summaries of the passages that contexts show."""

    command = "summarise"
    needed: ClassVar[dict[str, str]] = {
        "writer": "the model that summarises, such as a fit's checkpoint",
        "to": "the file that the summaries are written to",
    }

    def check(self) -> None:
        """Check that the file can be written."""
        self.file()

    def work(self) -> None:
        """Write the summaries that are missing."""
        task, data, trainer, path = self.model, self.datamodule, self.trainer, self.file()
        with named("--writer"):
            trained = trained_model(self.own.writer, task.backbone.dtype)
            trained = trained._replace(template_arguments=trained.template_arguments | task.template_arguments)
            by = digest_of_summaries(digest_of(self.own.writer, trained), trained, self.own.max_new_tokens)
        with growing_file("--to", path) as file, kept_if_stopped(path):
            known = summaries_of(file.rows, by)
            if not (passages := self._passages()):
                raise UserError(
                    "--splits", reason="no question fits into data.init_args.max_tokens, so there are no passages"
                )
            todo = [text for key, text in passages.items() if key not in known]
            if todo:
                writer = Summariser(trained, trainer.strategy.root_device, self.own.max_new_tokens)
                size = data.eval_batch_size
                parts = [todo[start : start + size] for start in range(0, len(todo), size)]
                with trainer.precision_plugin.forward_context():
                    for part in self.shown("Summarising")(parts):
                        for text, summary in zip(part, writer.summaries(part), strict=True):
                            file.add(line_of(text, by, summary))
                            known[digest_of_text(text)] = summary
        self._report(path, passages, known, len(todo))

    def _passages(self) -> dict[str, str]:
        """The texts of all passages that contexts show, by their digests."""
        data, asked = self.datamodule, self.own.splits
        for split in asked or ():
            if split not in data.splits():
                raise UserError("--splits", split, f"one of {', '.join(data.splits())}, which the data set has")
        return {
            digest_of_text(passage.text): passage.text
            for split in asked or data.splits()
            for record, _ in contexts(data, split)
            for passage in record.passages
            if passage.text.strip()
        }

    def _report(self, path: Path, passages: Mapping[str, str], known: Mapping[str, str], new: int) -> None:
        data, say = self.datamodule, PlainConsole().say
        pairs = [(text, known[key] or text) for key, text in passages.items()]
        whole, left = (token_counts(data.checked_tokenizer, list(texts)) for texts in zip(*pairs, strict=True))
        longer = sum(after > before for before, after in zip(whole, left, strict=True))
        empty = sum(not known[key] for key in passages)
        say(f"Summaries of {len(pairs):,} passages, {new:,} of them new, are in {path}")
        share = sum(left) / sum(whole)
        kinds = f"{longer:,} are longer than their passage, {empty:,} empty"
        say(f"Tokens: {sum(whole):,} → {sum(left):,} ({share:.1%}); {kinds}")
        setting = json.dumps({"class_path": "lrsa_lit.data.filters.Summaries", "init_args": {"map": str(path)}})
        use = shlex.join(["lrsa", "test", *self.arguments[3:], "--data.init_args.filter", setting])
        say(f"Use them: {redacted(use)} --ckpt_path CHECKPOINT")
