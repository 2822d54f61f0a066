"""What scores, the run's own attention and a run's answers are called by those who write and who read them."""

SCORES = {"loss": "answer loss", "f1": "F1", "em": "exact match"}
OWN = "LRSA"
"""The run's own attention, whose name among the evaluated ones is empty."""

ANSWERS = "predictions/val.jsonl"
"""A run's artifact with a line for each question of its last validation: ``step``, ``id``, ``question``, ``gold`` and,
for each attention, an object with ``prediction``, ``f1`` and ``em``."""

QUESTIONS = "predictions.json"
"""A run's artifact with a table of some of its answers: a row for each validation and question with ``step``, ``id``,
``question``, ``gold`` and, for each attention, the answer under its name and the scores (``LRSA F1``)."""

TOO_LONG_OF = "too_long of "
"""Before a task, the name of its count of questions that were left out."""
