"""``lrsa eval MODEL --tasks …``: lm-evaluation-harness on a model under its rule, another one, a system, or dense.

Nothing heavy is imported before the arguments are checked.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lrsa_lit.cli.arguments import Parser, called, checked, integer
from lrsa_lit.cli.model_options import (
    FLAGS,
    SOURCES,
    add_loading,
    add_rule,
    check_rule,
    check_source,
    device_of,
    loaded,
    rule_of,
    trained_of,
)
from lrsa_lit.errors import UserError
from lrsa_lit.models.checkpoint_file import SUFFIX
from lrsa_lit.paths import check_path, check_writable, expanded
from lrsa_lit.terminal import PlainConsole, log_to
from lrsa_lit.tracking.store import checked_uri, connect, default_uri

if TYPE_CHECKING:
    from lrsa_lit.attention import LRSAConfig
    from lrsa_lit.models.checkpoint import Trained

_FLAGS = (
    FLAGS
    | dict.fromkeys(("model", "source", "tokenizer"), "MODEL")
    | {
        "batch_size": "--batch-size",
        "max_length": "--max-length",
        "tracking_uri": "--store",
        "experiment_name": "--experiment",
        "system": "--rule: system",
    }
)
"""The options of this command for arguments of its parts."""

EPILOG = """\
A task is one of lm-evaluation-harness or of the folder --include-path, or a YAML file. Many tasks download their data.
Task files may run code that they name.

Scores become an MLflow run with metrics such as eval/arc_easy/acc. Its artifacts are the files that --out writes:
results.json, table.md, and all questions and answers.

examples:
  lrsa eval last.ckpt --tasks arc_easy,hellaswag --batch-size 8
  lrsa eval last.ckpt --tasks arc_easy --top-k 16
  lrsa eval my-model --tasks my_task.yaml --dense --limit 100
  lrsa eval my-model --tasks arc_easy --rule '{system: {class_path: SnapKV, init_args: {kept: 0.25, question: true}}}'
"""


@called(_FLAGS)
def run(arguments: Sequence[str]) -> None:
    """Run the command; a mistake in the arguments, the tasks or the model is a UserError."""
    options = _parse(arguments)
    notes = PlainConsole(stderr=True, soft_wrap=True)
    log_to(notes)
    device = device_of(options)
    trained = trained_of(options, device)
    rule = rule_of(trained, options, notes, options.rule)

    if not sys.stderr.isatty():
        # The harness's progress bars would fill a log.
        os.environ.setdefault("TQDM_DISABLE", "1")
    from lrsa_lit.harness.language_model import RuledLM, check_output_type, check_system
    from lrsa_lit.harness.run import check_gen_kwargs, load_tasks, output_types, quiet

    quiet()
    check_gen_kwargs(options.gen_kwargs)
    system = None if rule is None else rule.system
    check_system(system, options.batch_size)
    metadata = {"pretrained": str(options.model), "tokenizer": str(trained.backbone.location)}
    tasks, manager = load_tasks(options.tasks, options.include_path, metadata)
    for kind in output_types(tasks):
        check_output_type(system, kind)
    if not options.no_mlflow:
        # Detect a store that does not answer before hours of evaluation.
        connect(options.store, "--store")
    model = loaded(trained, rule, device)
    language_model = RuledLM(model, trained.tokenizer, batch_size=options.batch_size, max_length=options.max_length)
    results = _evaluate(language_model, options, tasks=tasks, task_manager=manager, device=str(device))
    results["config"]["lrsa"] = {"source": options.model, "rule": None if rule is None else rule.to_dict()}
    _report(results, options, trained, rule)


def _evaluate(language_model: Any, options: argparse.Namespace, **given: Any) -> Any:
    """Run the harness with the command's options."""
    from lm_eval import simple_evaluate

    seeds = ("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed")
    return simple_evaluate(
        language_model,
        **given,
        **dict.fromkeys(seeds, options.seed),
        num_fewshot=options.num_fewshot,
        batch_size=options.batch_size,
        limit=options.limit,
        system_instruction=options.system_instruction,
        apply_chat_template=options.apply_chat_template,
        fewshot_as_multiturn=options.fewshot_as_multiturn,
        gen_kwargs=options.gen_kwargs,
        confirm_run_unsafe_code=options.run_unsafe_code,
    )


def _report(results: Any, options: argparse.Namespace, trained: Trained, rule: LRSAConfig | None) -> None:
    """Print the table, and write and record the results as the options say."""
    from lrsa_lit.harness.run import metrics_of, table_of, write

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) if options.out is None else options.out
        write(results, folder)
        print(table_of(results), end="", flush=True)
        if options.out is not None:
            print(f"Results: {options.out}", flush=True)
        if not options.no_mlflow:
            run_id = _record(options, trained, rule, metrics_of(results), folder)
            print(f"Recorded as the run {run_id}; lrsa ui shows it")


def _record(
    options: argparse.Namespace, trained: Trained, rule: LRSAConfig | None, metrics: Mapping[str, float], folder: Path
) -> str:
    """Record the evaluation; returns the run's id."""
    from lrsa_lit.checkpoints.resume import writer_of
    from lrsa_lit.tracking.evaluation_run import EvaluationRun
    from lrsa_lit.tracking.params import flatten
    from lrsa_lit.tracking.run_record import family, rule_name

    settings = None if rule is None else rule.to_dict()
    named = "dense" if settings is None else rule_name({"lrsa": settings})
    tags = {"command": "eval", "rule": named, "seed": str(options.seed)}
    if options.model.endswith(SUFFIX):
        tags["checkpoint"] = options.model
        if (writer := writer_of(Path(options.model))) is not None:
            tags["checkpoint.run"] = writer
    asked = ("tasks", "num_fewshot", "limit", "batch_size", "max_length", "apply_chat_template", "gen_kwargs")
    params = {name: value for name in asked if (value := getattr(options, name)) is not None}
    model = {"model": {"source": trained.backbone.source, "dtype": trained.backbone.dtype, "lrsa": settings or "dense"}}
    name = f"eval-{family(trained.backbone.source)}-{named}"
    packages = ("lrsa-lit", "lm-eval", "torch", "transformers", "triton")
    recorded = EvaluationRun(name, {**params, **flatten(model)}, metrics, tags, folder, packages)
    return recorded.record(options.store, options.experiment)


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    about = "Evaluate a model with lm-evaluation-harness."
    parser = Parser("lrsa eval", description=about, epilog=EPILOG)
    add = parser.add_argument
    add("model", metavar="MODEL", help=SOURCES)
    add("--tasks", metavar="NAME", nargs="+", required=True, help="tasks, groups, patterns or YAML files; also A,B")
    add("--include-path", metavar="DIR", type=Path, help="a folder with further tasks")
    add_rule(parser)
    settings = "further settings of model.lrsa, as YAML or a file; the options above override them"
    add("--rule", metavar="SETTINGS", help=settings)
    batch = checked(_batch_size, "an integer >= 1, auto or auto:N")
    add("--batch-size", metavar="N", type=batch, default=1, help="requests at a time, or auto (default: 1)")
    add("--max-length", metavar="T", type=integer(2), help="most tokens of a request (default: the model's positions)")
    add("--num-fewshot", metavar="N", type=integer(0), help="examples before each question (default: the task's)")
    limit = checked(_limit, "a number of questions >= 1, or a share of them below 1")
    add("--limit", metavar="N", type=limit, help="questions of each task, or a share below 1")
    template = "render requests by the model's chat template, or by its template NAME"
    add("--apply-chat-template", nargs="?", const=True, default=False, metavar="NAME", help=template)
    add("--system-instruction", metavar="TEXT", help="a system message before each request")
    turns = "put few-shot examples into one message, not into turns of a chat"
    add("--no-fewshot-as-multiturn", dest="fewshot_as_multiturn", action="store_false", help=turns)
    add("--gen-kwargs", metavar="K=V,…", help="generation arguments for all tasks that generate")
    add(
        "--seed",
        metavar="N",
        type=integer(0),
        default=1234,
        help="seed of few-shot examples and sampled tokens (default: 1234)",
    )
    add("--run-unsafe-code", action="store_true", help="let tasks run code that the model writes")
    add_loading(parser)
    add("--out", metavar="DIR", type=Path, help="also write results to this new folder")
    add("--store", metavar="URI", help=f"the MLflow store (default: {default_uri()})")
    add("--experiment", metavar="NAME", help="the MLflow experiment (default: lrsa)")
    add("--no-mlflow", action="store_true", help="record no run")
    options = parser.parse_args(arguments)
    options.tasks = [name for given in options.tasks for name in given.split(",") if name]
    _check(options)
    return options


def _check(options: argparse.Namespace) -> None:
    """Check the options before anything is loaded."""
    check_source("MODEL", options.model)
    check_rule(options)
    if options.dense and options.rule is not None:
        raise UserError("--rule", reason="it is not allowed with --dense, which has no rule")
    if options.rule is not None:
        options.rule = _settings(options.rule)
    if not options.tasks:
        raise UserError("--tasks", reason="names no task")
    if options.include_path is not None:
        options.include_path = expanded("--include-path", options.include_path)
        if not options.include_path.is_dir():
            raise UserError("--include-path", options.include_path, reason="is not a folder")
    for name in options.tasks:
        check_path("--tasks", name)
        if name.endswith((".yaml", ".yml")) and not Path(name).is_file():
            raise UserError("--tasks", name, reason="does not exist")
    if options.out is not None:
        options.out = expanded("--out", options.out)
        if options.out.exists() and (not options.out.is_dir() or any(options.out.iterdir())):
            raise UserError("--out", options.out, reason="already exists; name a new folder")
        check_writable("--out", options.out, options.out.absolute())
    if not options.no_mlflow:
        options.store = checked_uri(options.store or default_uri(), "--store")
    if importlib.util.find_spec("lm_eval") is None:
        reason = "needs lm-evaluation-harness, which is not installed; pip install 'lrsa-lit[eval]'"
        raise UserError("lrsa eval", reason=reason)


def _settings(text: str) -> dict[str, Any]:
    """The settings that ``--rule`` gives, in a file or as YAML text."""
    import yaml

    from lrsa_lit.yaml_file import check_bounds, read_settings

    if text.endswith((".yaml", ".yml")):
        return read_settings(Path(text))
    check_bounds("--rule", text)
    try:
        found = yaml.safe_load(text)
    except yaml.YAMLError:
        found = None
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found):
        raise UserError("--rule", text[:80], "a mapping in YAML, or a file with one")
    return found


def _batch_size(text: str) -> int | str:
    if text == "auto" or (text.startswith("auto:") and int(text[5:]) >= 1):
        return text
    if (count := int(text)) < 1:
        raise ValueError(text)
    return count


def _limit(text: str) -> float | int:
    value = float(text)
    if not value > 0 or (value >= 1 and value != int(value)):
        raise ValueError(text)
    return int(value) if value >= 1 else value
