"""The tasks that runs are of, by the name that ``task`` has in settings; nothing is imported."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from lrsa_lit.errors import UserError

QUESTION_ANSWERING = "question_answering"
"""What a run is of unless its settings say otherwise."""


class Task(NamedTuple):
    """A task.

    Attributes:
        module: of its command line, with a function ``run``.
        defaults: the shipped file of its defaults.
        model: what it trains, as a dotted path.
        data: what it is trained on by default.
    """

    module: str
    defaults: str
    model: str
    data: str


TASKS = {
    QUESTION_ANSWERING: Task(
        "lrsa_lit.cli.lightning_cli", "cli.yaml", "lrsa_lit.tasks.LongContextQA", "lrsa_lit.data.QADataModule"
    ),
    "sentence_retrieval": Task(
        "lrsa_lit.cli.sentence_cli",
        "configs/task/sentence_retrieval.yaml",
        "lrsa_lit.tasks.SentenceRetrieval",
        "lrsa_lit.data.supporting_facts.SupportingFacts",
    ),
}


def named(layers: Iterable[Mapping[str, Any]]) -> str:
    """The task that the last of several layers of settings names.

    Raises:
        UserError: there is none of that name.
    """
    name = QUESTION_ANSWERING
    for settings in layers:
        name = settings.get("task", name)
    if name not in TASKS:
        raise UserError("task", name, " or ".join(TASKS))
    return str(name)


def check_is_question_answering(name: str, command: str) -> None:
    """Raise a UserError for a command that knows no other task."""
    if name != QUESTION_ANSWERING:
        raise UserError("task", name, QUESTION_ANSWERING, reason=f"is not allowed for {command}")
