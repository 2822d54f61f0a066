"""``lrsa study``: prepare a study's data, run its parts, show what is done, and report."""

from __future__ import annotations

import argparse
import functools
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lrsa_lit.cli.arguments import Parser, add_executor, resumable
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
    --into my-results.md
  lrsa study config configs/experiment/robustness.yaml lrsa-4x > row.yaml && lrsa fit --config row.yaml

A run does what is missing in the results, with `lrsa fit` and `lrsa test`, and stops after --minutes; run the same
command to continue.
"""


def run(arguments: Sequence[str]) -> None:
    """Run what follows ``lrsa study``.

    Raises:
        UserError: a mistake in the arguments or in the study.
        SystemExit: code 1 if a command of the study failed, 130 after Ctrl-C.
    """
    options = _parser().parse_args(arguments)
    options.action(options)


def open_study(name: str) -> Study:
    """Open the study of a file, which may be a shipped one; a UserError if it does not exist or is inconsistent."""
    from lrsa_lit.experiments.study import Study

    return Study(name, fit_settings())


@functools.cache
def fit_settings() -> FitSettings:
    """The parser that all studies of a process share."""
    from lrsa_lit.cli.fit_settings import FitSettings

    return FitSettings()


def _parser() -> Parser:
    parser = Parser("lrsa study", description="Rows of fits, each evaluated under several attentions.", epilog=EPILOG)
    actions = parser.add_subparsers(required=True, metavar="ACTION")
    shared: dict[str, dict[str, Any]] = {
        "study": {"help": "file of the study"},
        "--data": {"type": Path, "default": Path("study/data"), "help": "folder of the tokenised data sets"},
        "--part": {"nargs": "+", "required": True, "metavar": "PART", "help": "names of parts, done row by row"},
        "--out": {"type": Path, "default": Path("results.jsonl"), "help": "file of the results"},
    }

    def action(
        name: str, about: str, act: Callable[[argparse.Namespace], None], *takes: str
    ) -> argparse.ArgumentParser:
        added: argparse.ArgumentParser = actions.add_parser(name, help=about)
        added.set_defaults(action=act)
        for option in takes:
            added.add_argument(option, **shared[option])
        return added

    action("data", "tokenise the study's data sets", _data, "study", "--data")
    running = action("run", "train and evaluate the rows of parts", _run, *shared)
    add = running.add_argument
    add("--minutes", type=float, default=9.0, help="stop within this many minutes (default: 9)")
    add("--work", type=Path, default=Path("runs/study"), help="folder for weights and unfinished trainings")
    add("--rows", nargs="+", default=[], metavar="ROW", help="only these rows of the parts")
    add("--seeds", nargs="+", type=int, default=[], metavar="SEED", help="only these seeds")
    add("--shared", action="store_true", help="other processes use the device too: record no speed")
    add("--source", help="folder of the study's base LLM on this machine")
    add("--no-mlflow", action="store_true", help="record only lines of results, and no MLflow runs")
    add("--workers", type=int, default=1, help="processes on each device in an evaluation")
    add_executor(running)
    action("status", "show what is done of parts", _status, *shared)
    add = action("config", "print a row as a file for lrsa fit --config", _config, "study").add_argument
    add("row", help="name of the row")
    add("--seed", type=int, default=0)
    add = action("report", "tables, statistics and plots of the results", _report).add_argument
    add("results", nargs="+", help="file of the results, or URI of the MLflow store that the study recorded to")
    add("--study", nargs="+", required=True, metavar="FILE", help="file of the study, one for each file of results")
    add("--to", type=Path, help=f"folder for the report; default: {_REPORT}, unless --into is given")
    blocks = "fill the blocks <!-- study:NAME --> ... <!-- /study --> of these Markdown files, or of those in folders"
    add("--into", type=Path, nargs="+", default=[], metavar="FILE", help=blocks)
    add("--plots", type=Path, default=Path("docs/study"), help="folder for the plots of these blocks")
    add("--data", type=Path, help="folder of the data, for blocks that need the questions")
    return parser


def _data(options: argparse.Namespace) -> None:
    from lrsa_lit.experiments.questions import Questions, splits_of

    study = open_study(options.study)
    Questions(study, options.data).prepare(splits_of(study.work(*study.parts)), anew=True)


def _run(options: argparse.Namespace) -> None:
    if not options.minutes >= 0:  # nor NaN
        raise UserError("--minutes", options.minutes, "at least 0")
    if options.workers < 1:
        raise UserError("--workers", options.workers, "an integer >= 1")
    from lrsa_lit.experiments.on_ray import executor
    from lrsa_lit.experiments.questions import splits_of

    overlay: dict[str, Any] = {"trainer": {"logger": False}} if options.no_mlflow else {}
    if options.source is not None:
        overlay["model"] = {"backbone": {"source": options.source, "sha256": None}}
    runner = _runner(options, options.work, overlay, shared=options.shared or options.jobs > 1, workers=options.workers)
    works = runner.chosen(options.part, options.rows, options.seeds)
    with executor(options.on, 60 * options.minutes, options.jobs) as runs:
        runner.questions.prepare(splits_of(works))
        with resumable():
            done = runner.run(works, runs)
    print(
        f"{', '.join(options.part)}: {'done' if done else 'not done yet; run the same command to continue'}", flush=True
    )
    if runner.failed:
        raise SystemExit(1)


def _status(options: argparse.Namespace) -> None:
    runner = _runner(options, Path())
    for work, trained, missing in runner.todo(runner.chosen(options.part)):
        done = len(work.evaluations) - len(missing)
        state = "trained" if trained else "not trained"
        print(f"{work.row.name}, seed {work.seed} ({work.row.hash}): {state}, {done}/{len(work.evaluations)} evaluated")


def _runner(options: argparse.Namespace, *work: Any, **more: Any) -> Runner:
    from lrsa_lit.experiments.questions import Questions
    from lrsa_lit.experiments.results import Results
    from lrsa_lit.experiments.runner import Runner

    study = open_study(options.study)
    return Runner(study, Questions(study, options.data), Results(options.out, study), *work, **more)


def _config(options: argparse.Namespace) -> None:
    import yaml

    study = open_study(options.study)
    settings = study.as_config(options.row, options.seed)
    for other in study.row(options.row).needs:
        how = f"lrsa study config {options.study} {other.name} --seed {options.seed}"
        print(f"# {other.name}.ckpt is the last checkpoint of the fit that `{how}` prints.")
    print(yaml.safe_dump(settings, sort_keys=False, allow_unicode=True), end="")


def _report(options: argparse.Namespace) -> None:
    from lrsa_lit.experiments.parent_run import results_in
    from lrsa_lit.experiments.report.document import Blocks, fill_all, results_of, write_report

    several = len(options.study) > 1
    if len(options.results) != len(options.study):
        raise UserError("--study", " ".join(options.study), "one for each file of results, in the same order")
    if several and (options.to or not options.into):
        raise UserError("--to", options.to or _REPORT, reason="works with one study only; several studies need --into")
    blocks = []
    for results, study in zip(options.results, map(open_study, options.study), strict=True):
        with tempfile.TemporaryDirectory() as folder:
            path = results_in(results, study.title, Path(folder)) if "://" in results else Path(results)
            lines = results_of(study, path, may_be_empty=several)
        blocks.append(Blocks(study, lines, options.data))
    if options.into:
        fill_all(blocks, [file for path in options.into for file in _documents(path)], options.plots)
    if options.to or not options.into:
        write_report(study, lines, options.to or _REPORT)


def _documents(path: Path) -> list[Path]:
    """A file, or the Markdown files of a folder."""
    if not path.is_dir():
        return [path]
    if not (found := sorted(path.glob("*.md"))):
        raise UserError("--into", path, reason="has no Markdown file")
    return found
