"""Shared names of scores, of the run's own attention, and of artifacts."""

from __future__ import annotations

import math
from collections.abc import Container
from typing import Any

SCORES = {"loss": "answer loss", "f1": "F1", "em": "exact match"}
OWN = "LRSA"
"""The name of the run's own attention in files, whatever its system; among evaluated attentions its name is empty."""

ANSWERS = "predictions/val.jsonl"
"""Artifact with a line for each question of the last validation: ``step``, ``id``, ``question``, ``gold`` and, for each
attention, an object with ``prediction``, ``f1`` and ``em``."""

QUESTIONS = "predictions.json"
"""Artifact with a table of some answers: a row for each validation and question with ``step``, ``id``, ``question``,
``gold`` and, for each attention, the answer under its name and the scores (``LRSA F1``)."""

PAGE = "predictions.html"
"""Artifact with the last validation's rows of that table, as an HTML page."""

PICTURES = "pictures"
"""Folder of a run's pictures, both in the run's folder and among its artifacts."""

WORKLOAD = "workload/"
"""Prefix of metrics of the machine's utilisation."""

TOO_LONG_OF = "too_long of "
"""Prefix of a task's name in the count of its questions that were too long and left out."""


def title_of_own(rule: Any, others: Container[str] = ()) -> str:
    """The title of the run's own attention in a table: its system's name, if it has one.

    Args:
        rule: the run's ``LRSAConfig``.
        others: names of the other attentions.
    """
    title = OWN if rule.system is None else type(rule.system).__name__
    return f"{title} (the run's)" if title in others else title


def title_of_run(model: str, lag_size: float, top_k: float = math.nan) -> str:
    """A model and its rule, such as ``tiny L32 K8``; NaN values are left out."""
    numbers = (f"{letter}{value:g}" for letter, value in (("L", lag_size), ("K", top_k)) if not math.isnan(value))
    return " ".join([model, *numbers])
