"""``lrsa study``: prepare its data, run a part of it, show what is done, report."""

from __future__ import annotations

import argparse
import functools
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lrsa_lit.cli.arguments import Parser, add_on, terminable
from lrsa_lit.errors import UserError

if TYPE_CHECKING:
    from lrsa_lit.cli.fit_settings import FitSettings
    from lrsa_lit.experiments.runner import Runner
    from lrsa_lit.experiments.study import Study

_REPORT = Path("study/report")

EPILOG = """\
examples:
  lrsa study data configs/experiment/robustness.yaml --data study/data
  lrsa study run configs/experiment/robustness.yaml --part main --minutes 9 --data study/data --out results.jsonl
  lrsa study status configs/experiment/robustness.yaml --part main --data study/data --out results.jsonl
  lrsa study report results.jsonl --study configs/experiment/robustness.yaml --to study/report
  lrsa study report results.jsonl --study configs/experiment/robustness.yaml --data study/data \\
    --into README.md RESULTS.md
  lrsa study config configs/experiment/robustness.yaml lrsa-4x > row.yaml && lrsa fit --config row.yaml

A run does what the results do not hold yet, by `lrsa fit` and `lrsa test`, and stops in time; the same command goes on.
"""


def run(arguments: Sequence[str]) -> None:
    """Run the command.

    Args:
        arguments: what follows ``lrsa study``.

    Raises:
        UserError: a mistake in the arguments or in the study.
        SystemExit: code 1 if a command of the study failed, 130 after Ctrl-C.
    """
    options = _parser().parse_args(arguments)
    options.action(options)


def open_study(name: str) -> Study:
    """The study of a file, or of a shipped one.

    Raises:
        UserError: there is none, or it does not fit together.
    """
    from lrsa_lit.experiments.study import Study

    return Study(name, _fit_settings())


@functools.cache
def _fit_settings() -> FitSettings:
    from lrsa_lit.cli.fit_settings import FitSettings

    return FitSettings()


def _parser() -> Parser:
    parser = Parser("lrsa study", description="Rows of fits, each evaluated under several attentions.", epilog=EPILOG)
    actions = parser.add_subparsers(required=True, metavar="ACTION", parser_class=_SubParser)
    data = actions.add_parser("data", help="tokenise the study's data sets")
    _add(data, "study", "data")
    data.add_argument("--only", nargs="+", default=[], metavar="NAME", help="names of data sets; default: all")
    data.set_defaults(action=_data)
    run_parts = actions.add_parser("run", help="train and evaluate the rows of parts")
    _add(run_parts, "study", "data", "part", "out")
    run_parts.add_argument("--minutes", type=float, default=9.0, help="stop before these are over (default: 9)")
    run_parts.add_argument("--work", type=Path, default=Path("runs/study"), help="weights and unfinished trainings")
    run_parts.add_argument("--rows", nargs="+", default=[], metavar="ROW", help="these rows of the parts alone")
    run_parts.add_argument("--seeds", nargs="+", type=int, default=[], metavar="SEED", help="these seeds alone")
    run_parts.add_argument("--shared", action="store_true", help="others use the device as well: record no speed")
    run_parts.add_argument("--source", help="folder of the study's base LLM on this machine")
    run_parts.add_argument("--no-mlflow", action="store_true", help="record lines alone, and no runs of MLflow")
    run_parts.add_argument("--workers", type=int, default=1, help="processes on each device in an evaluation")
    add_on(run_parts)
    run_parts.set_defaults(action=_run)
    status = actions.add_parser("status", help="show what of a part is done")
    _add(status, "study", "data", "part", "out")
    status.set_defaults(action=_status)
    config = actions.add_parser("config", help="print a row as a file for lrsa fit --config")
    _add(config, "study")
    config.add_argument("row", help="name of the row")
    config.add_argument("--seed", type=int, default=0)
    config.set_defaults(action=_config)
    report = actions.add_parser("report", help="tables, statistics and plots of the results")
    report.add_argument("results", help="file of the results, or URI of the MLflow store that the study recorded to")
    report.add_argument("--study", required=True, help="file of the study, for its parts and their order")
    report.add_argument("--to", type=Path, help=f"folder for the report; default: {_REPORT}, unless --into")
    blocks = "fill the blocks <!-- study:NAME --> ... <!-- /study --> of these Markdown files"
    report.add_argument("--into", type=Path, nargs="+", default=[], metavar="FILE", help=blocks)
    report.add_argument("--plots", type=Path, default=Path("docs/study"), help="folder for the plots of these blocks")
    report.add_argument("--data", type=Path, help="folder of the data, for blocks that look at the questions")
    report.set_defaults(action=_report)
    return parser


class _SubParser(Parser):
    def __init__(self, *, prog: str, **options: object) -> None:
        super().__init__(prog, **options)


def _add(parser: argparse.ArgumentParser, *names: str) -> None:
    if "study" in names:
        parser.add_argument("study", help="file of the study")
    if "data" in names:
        parser.add_argument("--data", type=Path, default=Path("study/data"), help="folder of the tokenised data sets")
    if "part" in names:
        parser.add_argument("--part", nargs="+", required=True, metavar="PART", help="names of parts, done row by row")
    if "out" in names:
        parser.add_argument("--out", type=Path, default=Path("results.jsonl"), help="file of the results")


def _data(options: argparse.Namespace) -> None:
    from lrsa_lit.experiments.questions import Questions, splits_of

    study = open_study(options.study)
    Questions(study, options.data).prepare(splits_of(study, options.only), anew=True)


def _run(options: argparse.Namespace) -> None:
    if not options.minutes >= 0:  # nor NaN
        raise UserError("--minutes", options.minutes, "at least 0")
    if options.workers < 1:
        raise UserError("--workers", options.workers, "an integer >= 1")
    from lrsa_lit.experiments.on_ray import executor

    runner = _runner(options)
    works = runner.chosen(options.part, options.rows, options.seeds)
    with executor(options.on, 60 * options.minutes) as runs:
        runner.prepare(works)
        try:
            with terminable():
                done = runner.run(works, runs)
        except KeyboardInterrupt:
            print("\nlrsa: interrupted; the same command goes on", file=sys.stderr)
            raise SystemExit(130) from None
    print(f"{', '.join(options.part)}: {'done' if done else 'not done yet; the same command goes on'}", flush=True)
    if runner.failed:
        raise SystemExit(1)


def _status(options: argparse.Namespace) -> None:
    runner = _runner(options)
    for work, trained, missing in runner.todo(runner.chosen(options.part)):
        done = len(work.evaluations) - len(missing)
        state = "trained" if trained else "not trained"
        print(f"{work.row.name}, seed {work.seed} ({work.row.hash}): {state}, {done}/{len(work.evaluations)} evaluated")


def _runner(options: argparse.Namespace) -> Runner:
    from lrsa_lit.experiments.questions import Questions
    from lrsa_lit.experiments.results import Results
    from lrsa_lit.experiments.runner import Runner

    study = open_study(options.study)
    overlay: dict[str, Any] = {}
    if (source := getattr(options, "source", None)) is not None:
        overlay["model"] = {"backbone": {"source": source, "sha256": None}}
    if getattr(options, "no_mlflow", False):
        overlay["trainer"] = {"logger": False}
    return Runner(
        study,
        Questions(study, options.data),
        Results(options.out, study),
        getattr(options, "work", Path()),
        overlay,
        shared=getattr(options, "shared", False),
        workers=getattr(options, "workers", 1),
    )


def _config(options: argparse.Namespace) -> None:
    import yaml

    settings = open_study(options.study).as_config(options.row, options.seed)
    print(yaml.safe_dump(settings, sort_keys=False, allow_unicode=True), end="")


def _report(options: argparse.Namespace) -> None:
    from lrsa_lit.experiments.parent_run import results_in
    from lrsa_lit.experiments.report.document import fill, results_of, write_report

    study = open_study(options.study)
    with tempfile.TemporaryDirectory() as folder:
        stored = "://" in options.results
        path = results_in(options.results, study.title, Path(folder)) if stored else Path(options.results)
        lines = results_of(study, path)
    if options.into:
        fill(study, lines, options.into, options.plots, options.data)
    if options.to or not options.into:
        write_report(study, lines, options.to or _REPORT)
