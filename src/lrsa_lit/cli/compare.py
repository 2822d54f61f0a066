"""``lrsa compare``: compare systems, the rule, filters, low ranks and their products at equal cache bytes."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lrsa_lit.cli.arguments import LARGEST, Parser, add_executor, add_plugins, checked, integer, resumable
from lrsa_lit.errors import named
from lrsa_lit.paths import check_writable

if TYPE_CHECKING:
    from lrsa_lit.experiments.report.columns import Grid

EPILOG = """\
example:
  lrsa compare --model configs/model/smollm2.yaml --data configs/data/ruler.yaml configs/data/hotpotqa.yaml \\
    --budgets 0.5 0.25 0.125 --systems all --limit 200
  lrsa compare --model configs/model/smollm2.yaml --data configs/data/hotpotqa.yaml --budgets 0.25 0.125 \\
    --systems BM25 LoRC LagRelative 'LoRC@0.5*LagRelative' 'BM25@0.5*LagRelative' --limit 200

A product joins factors with *: at most one context filter, LoRC, and one system or compressor. @SHARE sets the share
of the bytes that a factor keeps; the factor without @SHARE is sized to meet each budget. Filters are compared
with two controls, Truncate and RandomSentences, automatically.

Evaluations whose results are in the folder are not repeated, so the same command continues a stopped comparison. The
comparison is a study: its file is written into the folder, and you can edit it and run it with `lrsa study`.
"""


def run(arguments: Sequence[str]) -> None:
    """Run what follows ``lrsa compare``.

    Raises:
        UserError: a mistake in the arguments.
        SystemExit: code 1 if an evaluation failed, 130 after Ctrl-C.
    """
    options = _parser().parse_args(arguments)
    check_writable("--to", options.to, options.to.absolute())
    from lrsa_lit import plugins
    from lrsa_lit.cli.study import open_study
    from lrsa_lit.experiments.on_ray import executor
    from lrsa_lit.experiments.questions import Questions, splits_of
    from lrsa_lit.experiments.report import at_budgets
    from lrsa_lit.experiments.results import Results
    from lrsa_lit.experiments.runner import Runner

    plugins.load(options.plugins)
    study = open_study(str(_study_file(options)))
    questions = Questions(study, options.to / "data")
    overlay: dict[str, Any] = {"trainer": {"logger": False}} if options.no_mlflow else {}
    runner = Runner(
        study, questions, Results(options.to / "results.jsonl", study), options.to, overlay, shared=options.jobs > 1
    )
    works = runner.chosen(list(study.parts))
    with executor(options.on, jobs=options.jobs) as runs:
        # Anew, because the files of the questions may have changed since the last time.
        questions.prepare(splits_of(works), anew=True)
        if options.data_only:
            print(f"The data is in {questions.folder}; the same command without --data-only evaluates", flush=True)
            return
        before = len(runner.results.lines)
        with resumable():
            runner.run(works, runs)
    if before and len(runner.results.lines) == before and not runner.failed:
        print(f"Nothing was left to evaluate: {options.to / 'results.jsonl'} has all results")
    if runner.results.lines:
        for section in at_budgets.write(study, runner.results.lines, options.to):
            _show(section.at_budgets, section.title)
            _show(section.holding, f"{section.title}: systems that hold the whole cache")
        print(f"Report: {options.to / 'README.md'}")
    if runner.failed:
        raise SystemExit(1)


def _study_file(options: argparse.Namespace) -> Path:
    """Write the file of the study."""
    import yaml

    from lrsa_lit.checkpoints import resume
    from lrsa_lit.cli.study import fit_settings
    from lrsa_lit.experiments.comparison import Asked, study_of
    from lrsa_lit.io import write_atomically

    if options.checkpoint is not None:
        with named("--checkpoint"):
            resume.named(options.checkpoint)
    names = [name for name in vars(options) if name in Asked.__dataclass_fields__]
    content, left_out = study_of(Asked(**{name: getattr(options, name) for name in names}), fit_settings())
    for line in left_out:
        print(line, flush=True)
    path: Path = options.to / f"{options.to.absolute().name}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
    write_atomically(path, lambda file: file.write(text.encode()))
    return path


def _parser() -> Parser:
    parser = Parser("lrsa compare", description=__doc__.partition(": ")[2].capitalize(), epilog=EPILOG)
    add = parser.add_argument
    add("--model", required=True, help="file of settings as for lrsa fit --config, or a model's folder or hub name")
    add("--data", nargs="+", required=True, metavar="FILE", help="files of settings, each with a data set")
    share = checked(_share, "a number above 0 and at most 1")
    add("--budgets", nargs="+", type=share, default=[0.5, 0.25, 0.125], metavar="SHARE", help="of a dense cache")
    systems = "systems, compressors, filters and LoRC as NAME or NAME={argument: value}, products as NAME@SHARE*NAME, "
    systems += "or all for all registered ones (default: all)"
    add("--systems", nargs="+", default=["all"], metavar="NAME", help=systems)
    add("--checkpoint", type=Path, help="checkpoint of a fit of the model, whose weights are used")
    add("--limit", type=integer(1), help="maximum number of questions of each data set")
    add("--lag-size", type=integer(2, LARGEST), default=128, help="L of the rule (default: 128)")
    add("--batch-size", type=integer(1, LARGEST), default=1, help="questions at a time (default: 1)")
    add("--to", type=Path, default=Path("runs/compare"), help="folder for all output (default: runs/compare)")
    add("--data-only", action="store_true", help="tokenise and filter the questions, and evaluate nothing")
    add("--no-mlflow", action="store_true", help="record no MLflow runs")
    add_executor(parser)
    add_plugins(parser)
    return parser


def _share(text: str) -> float:
    if not 0 < (value := float(text)) <= 1:
        raise ValueError(text)
    return value


def _show(grid: Grid, title: str) -> None:
    from rich.table import Table

    from lrsa_lit.terminal import PlainConsole

    if not grid.columns[0].values:
        return
    table = Table(title=title)
    for number, column in enumerate(grid.columns):
        table.add_column(column.title, justify="left" if number < grid.names else "right")
    shown = [["" if value is None else column.show(value) for value in column.values] for column in grid.columns]
    for row in zip(*shown, strict=True):
        table.add_row(*row)
    PlainConsole().print(table)
