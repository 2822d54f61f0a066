"""What scores, the run's own attention and a run's answers are called by those who write and who read them."""

from __future__ import annotations

import math
from collections.abc import Container
from typing import Any

SCORES = {"loss": "answer loss", "f1": "F1", "em": "exact match"}
OWN = "LRSA"
"""The run's own attention, whose name among the evaluated ones is empty; in files, whatever it is."""

ANSWERS = "predictions/val.jsonl"
"""A run's artifact with a line for each question of its last validation: ``step``, ``id``, ``question``, ``gold`` and,
for each attention, an object with ``prediction``, ``f1`` and ``em``."""

QUESTIONS = "predictions.json"
"""A run's artifact with a table of some of its answers: a row for each validation and question with ``step``, ``id``,
``question``, ``gold`` and, for each attention, the answer under its name and the scores (``LRSA F1``)."""

PAGE = "predictions.html"
"""The rows of the last validation in that table, as a page to read."""

PICTURES = "pictures"
"""Folder of a run's pictures, in its own folder and among its artifacts."""

WORKLOAD = "workload/"
"""Before the names of metrics that say what the machine does."""

TOO_LONG_OF = "too_long of "
"""Before a task, the name of its count of questions that were left out."""


def title_of_own(rule: Any, others: Container[str] = ()) -> str:
    """What a table calls the run's own attention: by its system, if it has one.

    Args:
        rule: the run's own ``LRSAConfig``.
        others: names of the attentions beside it.
    """
    title = OWN if rule.system is None else type(rule.system).__name__
    return f"{title} (the run's)" if title in others else title


def title_of_run(model: str, lag_size: float, top_k: float = math.nan) -> str:
    """A model and its rule, as in ``tiny L32 K8``, without what is NaN."""
    numbers = (f"{letter}{value:g}" for letter, value in (("L", lag_size), ("K", top_k)) if not math.isnan(value))
    return " ".join([model, *numbers])
