"""``lrsa summarise --writer MODEL --to FILE …``, with the arguments of ``lrsa fit``: summaries of a data set's texts.

The filter Summaries then shows them in the place of the passages.
"""

from __future__ import annotations

import argparse
import functools
import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from rich.progress import track

from lrsa_lit.cli.arguments import Parser, add_length, kept_if_stopped
from lrsa_lit.cli.lightning_cli import LRSACLI, run_with
from lrsa_lit.cli.main import prepared
from lrsa_lit.data.filters.contexts import contexts
from lrsa_lit.data.growing_file import growing_file
from lrsa_lit.data.module import SPLITS
from lrsa_lit.data.summary_file import digest_of_text, line_of, summaries_of
from lrsa_lit.data.tokenization import token_counts
from lrsa_lit.errors import UserError, named, redacted
from lrsa_lit.models.identity import digest_of
from lrsa_lit.models.sources import trained_model
from lrsa_lit.paths import check_writable, expanded
from lrsa_lit.tasks.summariser import Summariser, digest_of_summaries
from lrsa_lit.terminal import PlainConsole


def run(arguments: Sequence[str]) -> None:
    """Run the command; a mistake in the arguments or files is a UserError."""
    parser = Parser("lrsa summarise", add_help=False)
    parser.add_argument("--writer", metavar="MODEL")
    parser.add_argument("--to", metavar="FILE")
    add_length(parser)
    parser.add_argument("--splits", nargs="+", choices=SPLITS)
    own, others = parser.parse_known_args(arguments)
    run_with(functools.partial(_Summarise, own), prepared("fit", others))


class _Summarise(LRSACLI):
    """Parses and checks as a fit does, and writes summaries on one device."""

    def __init__(self, own: argparse.Namespace, arguments: Sequence[str]) -> None:
        self.own = own
        super().__init__(arguments)

    def instead(self) -> Callable[[], None] | None:
        """The writing of the summaries."""
        if self.asked("estimate"):
            raise UserError("--estimate", reason="it is not allowed for summarise; only a fit is estimated")
        if self.own.writer is None:
            raise UserError("--writer", reason="it is needed: the model that summarises, such as a fit's checkpoint")
        if self.own.to is None:
            raise UserError("--to", reason="it is needed: the file that the summaries are written to")
        path = expanded("--to", self.own.to)
        if path.is_dir():
            raise UserError("--to", path, "a file", reason="is a folder")
        check_writable("--to", path, path.absolute().parent)
        return functools.partial(self._write, path)

    def _write(self, path: Path) -> None:
        task, data, trainer = self.model, self.datamodule, self.trainer
        if not trainer.is_global_zero:
            return
        with named("--writer"):
            trained = trained_model(self.own.writer, task.backbone.dtype)
            by = digest_of_summaries(digest_of(self.own.writer, trained), trained, self.own.max_new_tokens)
        with growing_file("--to", path) as file, kept_if_stopped(path):
            known = summaries_of(file.rows, by)
            passages = self._passages()
            todo = [text for key, text in passages.items() if key not in known]
            if todo:
                writer = Summariser(trained, trainer.strategy.root_device, self.own.max_new_tokens)
                console, size = PlainConsole(stderr=True), data.eval_batch_size
                parts = [todo[start : start + size] for start in range(0, len(todo), size)]
                shown = track(parts, "Summarising", console=console, transient=True, disable=not console.is_terminal)
                with trainer.precision_plugin.forward_context():
                    for part in shown:
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
