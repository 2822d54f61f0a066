"""The tasks of runs, by their name in the setting ``task``; nothing heavy is imported."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from lrsa_lit.errors import UserError

QUESTION_ANSWERING = "question_answering"
"""The task of a run unless its settings name another one."""


class Task(NamedTuple):
    """A task.

    Attributes:
        module: the module of its command line, with a function ``run``.
        defaults: the shipped file with its defaults.
        model: the dotted path of the module that it trains.
        data: the dotted path of its default data.
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
    """The task that layers of settings name; the last one wins.

    Raises:
        UserError: there is no task of that name.
    """
    name = QUESTION_ANSWERING
    for settings in layers:
        name = settings.get("task", name)
    if name not in TASKS:
        raise UserError("task", name, " or ".join(TASKS))
    return str(name)


def check_is_question_answering(name: str, command: str) -> None:
    """Raise a UserError if a command that supports only question answering gets another task."""
    if name != QUESTION_ANSWERING:
        raise UserError("task", name, QUESTION_ANSWERING, reason=f"is not allowed for {command}")
