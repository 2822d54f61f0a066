"""What an evaluation shows at its end: the scores of its parts under every attention, and what was left out."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from lightning.pytorch import Trainer
from rich.table import Table

from lrsa_lit.callbacks.answers import AnswerWriter, PredictionWriter
from lrsa_lit.callbacks.fit_summary import run_lines
from lrsa_lit.names import OWN, SCORES, TOO_LONG_OF
from lrsa_lit.terminal import PlainConsole

if TYPE_CHECKING:
    from lrsa_lit.data.module import QADataModule, Split
    from lrsa_lit.tasks import LongContextQA

_EVALUATED = {**SCORES, "recall": "recall"}
_STAGES = {"val": "Validation", "test": "Test"}


def show_evaluation(trainer: Trainer, model: LongContextQA, data: QADataModule, split: Split) -> None:
    """Print what an evaluation found, what it left out and where its answers are, on the first process."""
    if not trainer.is_global_zero:
        return
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    console = PlainConsole()
    console.print(evaluation_table(metrics, list(model.attentions), data, split))
    for line in evaluation_notes(data, split, model.max_new_tokens):
        console.say(line)
    show_answers(trainer)


def show_answers(trainer: Trainer) -> None:
    """Print where the answers of an evaluation and its run are, on the first process."""
    if not trainer.is_global_zero:
        return
    console = PlainConsole()
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, AnswerWriter | PredictionWriter):
            for path in callback.lines.written:
                console.say(f"Answers: {path}")
    for line in run_lines(trainer):
        console.say(line)


def evaluation_table(metrics: Mapping[str, float], prefixes: Sequence[str], data: QADataModule, split: Split) -> Table:
    """A line for each part of an evaluation with its own score, then all scores of all questions, its own in bold.

    Args:
        metrics: as the task logs them.
        prefixes: of the attentions in the names of metrics, such as "" (the run's own, shown as LRSA) and "dense/".
        data: says what the parts are.
        split: "val" or "test".
    """
    questions = int(metrics[f"{split}/count"])
    table = Table(title=f"{_STAGES[split]} on {questions} question{'' if questions == 1 else 's'}")
    for name in ("part", "questions", "score"):
        table.add_column(name, justify="right" if name == "questions" else "left")
    for prefix in prefixes:
        table.add_column(prefix.removesuffix("/") or OWN, justify="right")

    def add(part: str, group: str, score: str) -> None:
        values = [metrics[f"{split}/{prefix}{group}{score}"] for prefix in prefixes]
        # Fewer than all batches may leave a part without a question.
        shown = ["-" if math.isnan(value) else f"{value:.3f}" for value in values]
        style = "bold" if score == data.score_of(group.removesuffix("/")) else None
        table.add_row(part, f"{metrics[f'{split}/{group}count']:.0f}", _EVALUATED[score], *shown, style=style)

    for group in data.groups(split):
        add(group, f"{group}/", data.score_of(group))
    table.add_section()
    for score in _EVALUATED:
        add("all", "", score)
    return table


def evaluation_notes(data: QADataModule, split: Split, new_tokens: int) -> list[str]:
    """Lines on questions that were left out or cut, and on answers that were given too little room."""
    totals: Counter[str] = Counter()
    for name, count in data.report[split].items():
        totals[name.rpartition("/")[2]] += count
    kept = totals["kept"]
    left_out = {name.removeprefix(TOO_LONG_OF): count for name, count in totals.items() if name.startswith(TOO_LONG_OF)}
    tasks = ", ".join(f"{count} of {task}" for task, count in left_out.items())
    budget = f"data.init_args.max_tokens ({data.max_tokens})"
    notes = {
        f"Left out, as they exceed {budget}: {{}} questions{f' ({tasks})' if tasks else ''}": totals["too_long"],
        f"Cut in the middle of the context, as they exceed {budget}: {{}} of {kept} questions": totals["truncated"],
        f"Longer than model.max_new_tokens ({new_tokens}), so never given in full: {{}} of {kept} reference answers": (
            data.unanswerable(split, new_tokens)
        ),
    }
    return [line.format(count) for line, count in notes.items() if count]
