"""Choosing preferred and rejected rewritings of a passage, after CoLoR (arXiv 2412.18232)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lrsa_lit.data.reading import check_row
from lrsa_lit.data.splits import disjoint_splits
from lrsa_lit.errors import UserError

PROMPT = "Summarize the following content.\n\n{passage}\n\nSummary:"
"""The published prompt that asks a model for a summary."""


@dataclass(frozen=True)
class Candidate:
    """A rewriting of a passage.

    Attributes:
        by: name of the writer.
        text: the rewriting, not empty.
        success: whether the question is answered correctly when the rewriting replaces the passage.
    """

    by: str
    text: str
    success: bool


@dataclass(frozen=True)
class PreferencePair:
    """Two rewritings of a passage; :meth:`from_dict` reads what ``dataclasses.asdict`` returns.

    Attributes:
        passage: the text that is rewritten, without its title.
        chosen: the rewriting to learn.
        rejected: the worse rewriting.
        title: the passage's title; "" if it has none.
        chosen_by: name of the chosen rewriting's writer; "" if unknown.
        rejected_by: name of the rejected rewriting's writer; "" if unknown.
    """

    passage: str
    chosen: str
    rejected: str
    title: str = ""
    chosen_by: str = ""
    rejected_by: str = ""

    @classmethod
    def from_dict(cls, row: Mapping[str, Any]) -> PreferencePair:
        """Build a pair from JSON types.

        Raises:
            UserError: a field is missing, unknown, empty or wrong, or both rewritings are equal.
        """
        required = ("passage", "chosen", "rejected")
        check_row(row, dict.fromkeys(required, str), dict.fromkeys(("title", "chosen_by", "rejected_by"), str))
        for name in required:
            if not row[name].strip():
                raise UserError(name, reason="is empty", allowed="a non-empty text")
        if row["chosen"].strip() == row["rejected"].strip():
            raise UserError("rejected", reason="is the same text as chosen, so there is nothing to prefer")
        return cls(**{name: value for name, value in row.items() if value is not None})


def preferred(candidates: Sequence[Candidate], *, hard: bool = True) -> tuple[Candidate, Candidate] | None:
    """Pick the chosen and the rejected rewriting of a passage.

    The chosen one is the shortest success, and the rejected one the longest failure, in characters. If all succeed or
    all fail, they are the shortest and the longest of all. Ties go to the first. The chosen rewriting may be longer
    than the rejected one.

    Args:
        candidates: rewritings of one passage for one question.
        hard: return no pair if all candidates fail.

    Returns:
        The chosen and the rejected rewriting; None if there are no candidates, or both texts are equal.
    """
    good = [each for each in candidates if each.success]
    bad = [each for each in candidates if not each.success]
    if not candidates or (hard and not good):
        return None
    chosen = min(good if good and bad else candidates, key=lambda each: len(each.text))
    rejected = max(bad if good and bad else candidates, key=lambda each: len(each.text))
    return None if chosen.text == rejected.text else (chosen, rejected)


def in_two(
    pairs: Sequence[PreferencePair], held_out: float, seed: int
) -> tuple[list[PreferencePair], list[PreferencePair]]:
    """Split pairs into training and held-out pairs that share no passage and no title.

    Args:
        pairs: the pairs, in any order; duplicates are dropped.
        held_out: minimum share of held-out pairs, in (0, 1).
        seed: seed of the split.

    Raises:
        UserError: all pairs share one passage or title, so one part would be empty.
    """
    pairs = list(dict.fromkeys(pairs))
    keys = [[("text", pair.passage), *([("title", pair.title)] if pair.title else [])] for pair in pairs]
    splits = disjoint_splits(keys, held_out, 0.0, seed)
    if not splits["train"] or not splits["val"]:
        raise UserError("pairs", len(pairs), "pairs of at least two passages: one to train on, one to hold out")
    train, held = ([pairs[position] for position in splits[name]] for name in ("train", "val"))
    return train, held
