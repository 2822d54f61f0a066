"""``lrsa preference-pairs --judge MODEL --to FOLDER …``, with the arguments of ``lrsa fit``: make pairs of rewritings.

The model of the settings rewrites the supporting passages of the training split's questions, the judge answers the
questions with each rewriting, and a fit on the pairs makes a summariser of the model (CoLoR, arXiv 2412.18232).
"""

from __future__ import annotations

import functools
import json
import shlex
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any, ClassVar

from lrsa_lit.cli.arguments import Parser, add_length, integer, kept_if_stopped, without_data
from lrsa_lit.cli.fit_tool import FitTool, run_tool
from lrsa_lit.data.filters import POSPriorityChunks
from lrsa_lit.data.filters.contexts import contexts
from lrsa_lit.data.growing_file import GrowingFile, growing_file
from lrsa_lit.data.preferences import PreferencePair, in_two
from lrsa_lit.errors import UserError, named, redacted
from lrsa_lit.io import write_atomically
from lrsa_lit.models.identity import digest_of
from lrsa_lit.models.sources import trained_model
from lrsa_lit.paths import check_writable, expanded
from lrsa_lit.tasks.preference_judge import PreferenceJudge
from lrsa_lit.tasks.rewritings import Rewritings, digest_of_rewritings, pair_of
from lrsa_lit.tasks.summariser import Summariser, digest_of_summaries
from lrsa_lit.terminal import PlainConsole

CANDIDATES = "candidates.jsonl"
SHARE = 0.1
"""Share of the pairs that is held out."""


def run(arguments: Sequence[str]) -> None:
    """Run the command; a mistake in the arguments or files is a UserError."""
    parser = Parser("lrsa preference-pairs", add_help=False)
    parser.add_argument("--judge", metavar="MODEL")
    parser.add_argument("--to", metavar="FOLDER")
    parser.add_argument("--pairs", metavar="N", type=integer(2), default=300)
    add_length(parser)
    parser.add_argument("--weak", action="store_true")
    run_tool(_PreferencePairs, parser, arguments)


class _PreferencePairs(FitTool):
    """Rewrites passages, has the rewritings judged, and makes pairs of them."""

    command = "preference-pairs"
    needed: ClassVar[dict[str, str]] = {
        "judge": "a model that answers the data's questions",
        "to": "the folder that the pairs are written to",
    }

    def check(self) -> None:
        """Check that the folder can be written and that the tagger for one kind of rewriting is installed."""
        with named(self.command):
            POSPriorityChunks()
        folder = expanded("--to", self.own.to)
        check_writable("--to", folder, folder)

    def work(self) -> None:
        """Make the pairs."""
        folder = expanded("--to", self.own.to)
        with growing_file("--to", folder / CANDIDATES) as file, kept_if_stopped(file.path):
            rewritings = self._rewritings(file)
            lines, pairs = self._made(rewritings)
        with named("--to"):
            if not pairs:
                raise UserError("--to", reason=_why_none(rewritings, lines))
            parts = dict(zip(("train", "val"), in_two(pairs, SHARE, self.datamodule.seed), strict=True))
        for name, part in parts.items():
            content = "".join(json.dumps(asdict(pair), ensure_ascii=False) + "\n" for pair in part).encode()
            write_atomically(folder / f"{name}.jsonl", functools.partial(_fill, content))
        self._report(folder, lines, parts)

    def _rewritings(self, file: GrowingFile) -> Rewritings:
        task, data, device = self.model, self.datamodule, self.trainer.strategy.root_device
        with named("--judge"):
            found = trained_model(self.own.judge, task.backbone.dtype)
            judged_by = digest_of(self.own.judge, found)
            # Contexts may have max_tokens, and a rewriting may be longer than its passage.
            most = data.max_tokens + self.own.max_new_tokens
            judge = PreferenceJudge(found, device, most, data.eval_batch_size)
        start = task.start()._replace(template_arguments=task.template_arguments)
        source = task.start_from or task.backbone.source
        writer = Summariser(start, device, self.own.max_new_tokens)
        written_by = digest_of_summaries(digest_of(source, start), start, self.own.max_new_tokens)
        by = digest_of_rewritings(judged_by, found.template_arguments, written_by, data.max_tokens)
        return Rewritings(writer, judge, by, file)

    def _made(self, rewritings: Rewritings) -> tuple[list[Mapping[str, Any]], list[PreferencePair]]:
        """Judge passages until there are enough pairs; returns the lines of the passages, and the pairs."""
        lines: list[Mapping[str, Any]] = []
        pairs: dict[PreferencePair, None] = {}
        shown = self.shown("Judging rewritings")
        with self.trainer.precision_plugin.forward_context():
            for line in shown(rewritings.of(contexts(self.datamodule, "train"))):
                lines.append(line)
                if (pair := pair_of(line, hard=not self.own.weak)) is not None:
                    pairs[pair] = None
                if len(pairs) == self.own.pairs:
                    break
        return lines, list(pairs)

    def _report(
        self, folder: Path, lines: Sequence[Mapping[str, Any]], parts: Mapping[str, list[PreferencePair]]
    ) -> None:
        say, pairs = PlainConsole().say, [pair for part in parts.values() for pair in part]
        candidates = [each for line in lines for each in line["candidates"]]
        made, good = (Counter(_kind(each["by"]) for each in of)
                      for of in (candidates, [each for each in candidates if each["success"]]))  # fmt: skip
        shares = ", ".join(f"{kind} {good[kind] / count:.0%}" for kind, count in made.items())
        say(f"Passages judged: {len(lines)}; rewritings that succeed: {shares}")
        chosen, rejected = (_listed(getattr(pair, name) for pair in pairs) for name in ("chosen_by", "rejected_by"))
        say(f"Pairs: {len(pairs)}; chosen: {chosen}; rejected: {rejected}")
        length = sum(len(pair.chosen) for pair in pairs) / sum(len(pair.passage) for pair in pairs)
        say(f"Chosen rewritings have {length:.1%} of the characters of their passages")
        files = {name: folder / f"{name}.jsonl" for name in parts}
        say(f"To train on: {len(parts['train'])} in {files['train']}; held out: {len(parts['val'])} in {files['val']}")
        of_data = [part for name, path in files.items() for part in (f"--data.init_args.{name}", str(path))]
        # The first arguments name the command and the shipped defaults; later settings win.
        settings = [*without_data(self.arguments[3:]), "--config", "configs/experiment/color.yaml", *of_data]
        say(f"Train a summariser: {redacted(shlex.join(['lrsa', 'fit', *settings]))}")


def _fill(content: bytes, file: IO[bytes]) -> None:
    file.write(content)


def _kind(by: str) -> str:
    """The kind of a rewriting, without its number."""
    return by.partition("-")[0]


def _listed(names: Iterable[str]) -> str:
    """The counts of each kind, largest first."""
    return ", ".join(f"{count} {kind}" for kind, count in Counter(map(_kind, names)).most_common())


def _why_none(rewritings: Rewritings, lines: Sequence[object]) -> str:
    """The reason why there are no pairs."""
    if lines:
        return f"no pair among the rewritings of {len(lines)} passages; --weak takes those whose rewritings all fail"
    if rewritings.too_long:
        return f"the judge has too few positions for the questions about {rewritings.too_long} passages"
    return f"none of {rewritings.without} questions has supporting_titles, whose passages are rewritten"
