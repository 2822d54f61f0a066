"""The JSON lines that ``lrsa predict`` writes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lrsa_lit.attention import LRSAConfig
from lrsa_lit.data.collate import Batch
from lrsa_lit.evaluation.answers import scores


def prediction_lines(
    batch: Batch, texts: Sequence[str], lengths: Sequence[int], rule: LRSAConfig
) -> list[dict[str, Any]]:
    """A dict for a JSON line for each question of a batch, except rows that another process writes.

    Args:
        batch: the questions.
        texts: the answer to each question.
        lengths: the number of tokens of each answer.
        rule: the rule of the answers.
    """
    lines = []
    for row, text in enumerate(texts):
        if batch["repeated"][row]:
            continue
        found = scores(text, batch["answers"][row], batch["match"][row])
        lines.append(
            {
                "id": batch["id"][row],
                "prediction": text,
                "gold": list(batch["answers"][row]),
                "f1": found["f1"],
                "exact_match": found["em"],
                "prompt_tokens": batch["prompt_length"][row],
                "new_tokens": lengths[row],
                "config": rule.digest(),
            }
        )
    return lines
