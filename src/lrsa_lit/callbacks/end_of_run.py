"""Summaries at the end of a run: scores, left-out questions, and the places of run, answers and checkpoints."""

from __future__ import annotations

import math
import shlex
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from rich.table import Table

from lrsa_lit import plugins
from lrsa_lit.callbacks.filter_table import filter_tables
from lrsa_lit.callbacks.writers import LineWriter
from lrsa_lit.checkpoints.form import check_form
from lrsa_lit.data.module import QADataModule, Split
from lrsa_lit.errors import redacted
from lrsa_lit.run_labels import OWN, SCORES, TOO_LONG_OF, title_of_own
from lrsa_lit.tasks import LongContextQA
from lrsa_lit.tasks.measures import MEASURES
from lrsa_lit.terminal import PlainConsole
from lrsa_lit.tracking.artifacts import others_of, run_folder
from lrsa_lit.tracking.logger import mlflow_run

_FITTED = {**SCORES, "perplexity": "perplexity"}
_EVALUATED = {**SCORES, "recall": "recall", "perplexity": "perplexity"}
_STAGES = {"val": "Validation", "test": "Test"}
_COLUMNS = 5
"""Maximum number of attentions that fit side by side in a table."""
_BATCHES = 10
"""Number of batches over which a term's loss is averaged at the start and end of a fit."""


class ValidationHistory(Callback):
    """Keep the metrics of each complete validation of a run.

    Attributes:
        history: the optimizer step and the metrics ``val/…`` of each validation.
    """

    def __init__(self) -> None:
        self.history: list[tuple[int, dict[str, float]]] = []

    def state_dict(self) -> dict[str, Any]:
        """The history for a checkpoint, so that a resumed fit still has the run's first validations."""
        return {"history": [[step, values] for step, values in self.history]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the history of the run; raise a UserError if it has a wrong form."""
        key = f"callbacks.{type(self).__name__}.history"
        for number, entry in enumerate(state_dict["history"]):
            check_form(entry, [0, {}], f"{key}.{number}")
            check_form(list(entry[1].values()), [0.0] * len(entry[1]), f"{key}.{number}.1")
        self.history = [(step, values) for step, values in state_dict["history"]]

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the metrics of a complete validation."""
        if not trainer.sanity_checking:
            values = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
            self.history.append((trainer.global_step, values))


class ClosingSummary(ABC):
    """The summary at the end of a fit.

    Attributes:
        history: see :class:`ValidationHistory`.
    """

    history: list[tuple[int, dict[str, float]]]

    @abstractmethod
    def show(self, trainer: Trainer) -> None:
        """Print the summary on the first process, after the progress bar has closed."""


class FitSummary(ValidationHistory, ClosingSummary):
    """Print a table at the end of a fit: every attention's scores before and after training.

    "Before" is the first validation (at step 0), "after" the last one. If the objective has several terms, a second
    table has the mean loss of each term over the first and over the last batches of the first process.
    """

    def __init__(self) -> None:
        super().__init__()
        self.losses: dict[str, tuple[list[Any], list[Any]]] = {}
        """For each term of the objective: losses of the first batches, and of the last ones."""

    def state_dict(self) -> dict[str, Any]:
        """The state for a checkpoint, so that the tables of a resumed fit still cover the start of the run."""
        losses = {name: [list(map(float, end)) for end in ends] for name, ends in self.losses.items()}
        return super().state_dict() | ({"losses": losses} if losses else {})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the validations and losses of the run; raise a UserError if they have a wrong form."""
        super().load_state_dict(state_dict)
        losses = state_dict.get("losses", {})
        check_form(losses, {}, "callbacks.FitSummary.losses")
        for name, ends in losses.items():
            check_form(ends, [[], []], f"callbacks.FitSummary.losses.{name}")
            check_form(ends, [[0.0] * len(end) for end in ends], f"callbacks.FitSummary.losses.{name}")
        self.losses = {name: (first, last) for name, (first, last) in losses.items()}

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Keep the losses of the objective's terms, without synchronising with the device."""
        terms = pl_module.objective.terms if isinstance(pl_module, LongContextQA) else ()
        for term in terms if len(terms) > 1 else ():
            loss = trainer.callback_metrics[f"train/loss/{term.name}"].detach().clone()
            first, last = self.losses.setdefault(term.name, ([], []))
            first += [loss][: _BATCHES - len(first)]
            last[:] = [*last, loss][-_BATCHES:]

    def show(self, trainer: Trainer) -> None:
        """Print the summary on the first process, after the progress bar has closed."""
        if not trainer.is_global_zero:
            return
        console = PlainConsole()
        if self.history:
            task = trainer.lightning_module
            own = title_of_own(task.lrsa, task.attentions) if isinstance(task, LongContextQA) else OWN
            data = getattr(trainer, "datamodule", None)
            console.print(_summary_table(self.history, own, getattr(data, "noun", QADataModule.noun)))
        if self.losses:
            console.print(_losses_table(self.losses))
        # Without a validation during training, there is no best checkpoint.
        for kind, name in (("Best", "best_model_path"), ("Last", "last_model_path")):
            if checkpoint := getattr(trainer.checkpoint_callback, name, ""):
                console.say(f"{kind} checkpoint: {checkpoint}")
                break
        _show_run(trainer, console)


def _summary_table(history: Sequence[tuple[int, dict[str, float]]], own: str, noun: str) -> Table:
    """A table with one row per attention: scores of the first and last entry, or of the only one."""
    ends, last = [*history[:1], *history[1:][-1:]], history[-1][1]
    steps = " → ".join(f"step {step}" for step, _ in ends)
    found_of = {name.rpartition("/")[2] for name in last}
    known = [name for name in _FITTED if name in found_of]
    title = f"Validation on {_counted(last.get('val/count', 0), noun)}, {steps}"
    table = _table(title, (_FITTED[name] for name in known))
    for prefix in sorted({name.removeprefix("val/").rpartition("/")[0] for name in last}):
        stem = f"val/{prefix}/" if prefix else "val/"
        found = [[values.get(stem + name, math.nan) for _, values in ends] for name in known]
        # Parts of an evaluation have no loss.
        shown = ("" if math.isnan(scores[-1]) else " → ".join(f"{score:.3f}" for score in scores) for scores in found)
        table.add_row(prefix or own, *shown)
    return table


def _losses_table(losses: Mapping[str, tuple[Sequence[Any], Sequence[Any]]]) -> Table:
    """A table with one row per term of an objective; losses are not weighted."""
    count = min(len(first) for first, _ in losses.values())
    table = Table("training loss")
    for end in ("first", "last"):
        table.add_column(f"mean of the {end} {count} batches", justify="right")
    for name, ends in losses.items():
        table.add_row(name, *(f"{sum(map(float, end)) / len(end):.3f}" for end in ends))
    return table


def _table(title: str, scores: Iterable[str]) -> Table:
    table = Table(title=title)
    table.add_column("inference")
    for label in scores:
        table.add_column(label, justify="right")
    return table


def _counted(count: float, noun: str) -> str:
    return f"{int(count)} {noun}{'' if count == 1 else 's'}"


def _show_run(trainer: Trainer, console: PlainConsole) -> None:
    """Print the run, and the command that compares it with others, if runs are recorded."""
    for other in others_of(trainer):
        console.say(f"{type(other).__name__}: {run_folder(trainer) if other is trainer.logger else other.save_dir}")
    if (logger := mlflow_run(trainer)) is not None:
        experiment = logger.experiment_name
        console.say(f"Run {logger.version} of experiment {experiment!r} in {logger.store}")
        command = ["lrsa", "ui", "--store", logger.store, "--experiment", experiment]
        console.say(f"Compare its runs: {shlex.join(command)}")


def show_evaluation(trainer: Trainer, model: LongContextQA, data: QADataModule, split: Split) -> None:
    """Print the results of an evaluation, the left-out questions and the files of answers, on the first process."""
    if not trainer.is_global_zero:
        return
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    console = PlainConsole()
    for table in [*_evaluation_tables(metrics, model, data, split), *filter_tables(data, split)]:
        console.print(table)
    for line in _evaluation_notes(data, split, model.max_new_tokens if model.generate_answers else None):
        console.say(line)
    show_answers(trainer)


def show_answers(trainer: Trainer) -> None:
    """Print the files of an evaluation's answers and its run, on the first process."""
    if not trainer.is_global_zero:
        return
    console = PlainConsole()
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, LineWriter):
            for path in callback.lines.written:
                console.say(f"{callback.title}: {path}")
    _show_run(trainer, console)


def show_next(
    checkpoint: str,
    arguments: Sequence[str],
    *,
    tests: bool,
    rewrites: str = "",
    asks: bool = True,
    modules: Sequence[str] = (),
) -> None:
    """Print commands for the next steps with a fit's checkpoint: a test, and questions about a text.

    For a model trained on pairs of rewritings, the command summarises passages instead of asking questions.

    Args:
        checkpoint: path of the best checkpoint.
        arguments: the arguments of ``lrsa fit``, which the test repeats.
        tests: whether the data set has a test split.
        rewrites: the model's source if it was trained on pairs of rewritings; otherwise "".
        asks: whether ``lrsa ask`` accepts the checkpoint.
        modules: the plugins of the fit, without which a checkpoint with one of their classes is refused.
    """
    console, needed = PlainConsole(), plugins.flags_of(modules)
    if tests:
        again = [*_without(arguments, "--ckpt_path"), "--ckpt_path", checkpoint]
        console.say(f"Test it: {redacted(shlex.join(['lrsa', 'test', *again]))}")
    if rewrites:
        of_data = ["--model.backbone.source", rewrites, "--config", "configs/data/hotpotqa.yaml"]
        summarise = ["lrsa", "summarise", *needed, "--writer", checkpoint, "--to", "summaries.jsonl", *of_data]
        console.say(f"Summarise passages with it: {shlex.join(summarise)}")
    elif asks:
        ask = ["lrsa", "ask", *needed, "--model", checkpoint, "report.txt"]
        console.say(f"Ask it: {shlex.join(ask)}")


def _without(arguments: Sequence[str], flag: str) -> list[str]:
    """Arguments without a flag and its value."""
    kept = list(arguments)
    while flag in kept:
        position = kept.index(flag)
        del kept[position : position + 2]
    return [argument for argument in kept if not argument.startswith(f"{flag}=")]


def _evaluation_tables(
    metrics: Mapping[str, float], model: LongContextQA, data: QADataModule, split: Split
) -> list[Table]:
    """Tables of an evaluation's results, with one column per attention, or one row per attention if there are many.

    With columns, there is one row per part with its published metric (or the loss, if no answers were generated), then
    all scores over all questions with the published metric in bold, then the cost of each attention.
    """
    names, own = list(model.attentions), title_of_own(model.lrsa, model.attentions)
    scores = {name: label for name, label in _EVALUATED.items() if f"{split}/{name}" in metrics}
    title = f"{_STAGES[split]} on {_counted(metrics[f'{split}/count'], data.noun)}"
    stems = [f"{split}/{name}/" if name else f"{split}/" for name in names]

    def values(group: str, score: str) -> list[str]:
        found = [metrics.get(f"{stem}{group}{score}", math.nan) for stem in stems]
        # If not all batches are run, a part may have no question.
        return ["-" if math.isnan(value) else f"{value:.3f}" for value in found]

    taken = {name: label for name, label in MEASURES.items() if any(f"{stem}{name}" in metrics for stem in stems)}
    if len(names) > _COLUMNS:
        tables = []
        for about, shown in ((title, scores), ("What it took", taken)):
            table = _table(about, shown.values())
            for row in zip(names, *(values("", key) for key in shown), strict=True):
                table.add_row(row[0] or own, *row[1:])
            tables += [table] if shown else []
        return tables
    table = Table(title=title)
    for name in ("part", f"{data.noun}s", "score", *(name or own for name in names)):
        table.add_column(name, justify="left" if name in ("part", "score") else "right")

    def add(part: str, group: str, score: str) -> None:
        style = "bold" if score == data.score_of(group.removesuffix("/")) else None
        count = f"{metrics[f'{split}/{group}count']:.0f}"
        table.add_row(part, count, scores[score], *values(group, score), style=style)

    for group in data.groups(split):
        add(group, f"{group}/", data.score_of(group) if "f1" in scores else "loss")
    table.add_section()
    for score in scores:
        add("all", "", score)
    table.add_section()
    for name, label in taken.items():
        table.add_row("all", "", label, *values("", name))
    return [table]


def _evaluation_notes(data: QADataModule, split: Split, new_tokens: int | None) -> list[str]:
    """Notes on questions that were left out or cut, and on answers that max_new_tokens is too small for, if any."""
    totals: Counter[str] = Counter()
    for name, count in data.report[split].items():
        totals[name.rpartition("/")[2]] += count
    kept = totals["kept"]
    left_out = {name.removeprefix(TOO_LONG_OF): count for name, count in totals.items() if name.startswith(TOO_LONG_OF)}
    tasks = ", ".join(f"{count} of {task}" for task, count in left_out.items())
    budget = f"max_tokens ({data.max_tokens})"
    notes = {
        f"Left out, as they exceed {budget}: {{}} {data.noun}s{f' ({tasks})' if tasks else ''}": totals["too_long"],
        f"Cut in the middle of the context, as they exceed {budget}: {{}} of {kept} {data.noun}s": totals["truncated"],
        f"Left out, as no token follows their context (scored_from): {{}} {data.noun}s": totals["too_short"],
        f"Longer than max_new_tokens ({new_tokens}), so never generated in full: {{}} of {kept} reference answers": (
            0 if new_tokens is None else data.unanswerable(split, new_tokens)
        ),
    }
    return [line.format(count) for line, count in notes.items() if count]
