"""Which of several rewritings of a passage is to be preferred, as CoLoR has it (arXiv 2412.18232)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lrsa_lit.data.reading import check_row
from lrsa_lit.data.splits import disjoint_splits
from lrsa_lit.errors import UserError

PROMPT = "Summarize the following content.\n\n{passage}\n\nSummary:"
"""What a model is asked for a summary with: the published prompt."""


@dataclass(frozen=True)
class Candidate:
    """A rewriting of a passage.

    Attributes:
        by: what has made it.
        text: the rewriting, not empty.
        success: whether the question is answered with it in the place of the passage.
    """

    by: str
    text: str
    success: bool


@dataclass(frozen=True)
class PreferencePair:
    """Two rewritings of a passage; ``dataclasses.asdict`` gives what :meth:`from_dict` takes.

    Attributes:
        passage: the text that is rewritten; its title is not.
        chosen: the rewriting to learn.
        rejected: the one that is worse.
        title: of the passage; "" if it has none.
        chosen_by: what has made the chosen one; "" if it is not known.
        rejected_by: what has made the other.
    """

    passage: str
    chosen: str
    rejected: str
    title: str = ""
    chosen_by: str = ""
    rejected_by: str = ""

    @classmethod
    def from_dict(cls, row: Mapping[str, Any]) -> PreferencePair:
        """Build a pair from JSON types; a UserError names a field that is missing, unknown, empty or wrong."""
        required = ("passage", "chosen", "rejected")
        check_row(row, dict.fromkeys(required, str), dict.fromkeys(("title", "chosen_by", "rejected_by"), str))
        for name in required:
            if not row[name].strip():
                raise UserError(name, reason="is empty", allowed="a text that is not")
        if row["chosen"].strip() == row["rejected"].strip():
            raise UserError("rejected", reason="is the same text as chosen, so there is nothing to prefer")
        return cls(**{name: value for name, value in row.items() if value is not None})


def preferred(candidates: Sequence[Candidate], *, hard: bool = True) -> tuple[Candidate, Candidate] | None:
    """The chosen and the rejected one of a passage's rewritings, lengths being those in characters.

    Chosen is the shortest success, rejected the longest failure. Where all succeed, or all fail, it is the shortest and
    the longest of all; of equally long ones the first. The chosen one may be the longer of the two.

    Args:
        candidates: of one passage and question.
        hard: leave out a passage where all fail.

    Returns:
        None where there is no pair: nothing to compare, or two equal texts.
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
    """Pairs to train on and pairs to hold out: no passage, and no title, is in both.

    Args:
        pairs: in any order; equal ones count once.
        held_out: the share that is held out at least, in (0, 1).
        seed: decides which.

    Raises:
        UserError: all pairs are about one passage, or one title, so that one of the two would be empty.
    """
    pairs = list(dict.fromkeys(pairs))
    keys = [[("text", pair.passage), *([("title", pair.title)] if pair.title else [])] for pair in pairs]
    splits = disjoint_splits(keys, held_out, 0.0, seed)
    if not splits["train"] or not splits["val"]:
        raise UserError("pairs", len(pairs), "of two passages at least: one to train on, one to hold out")
    train, held = ([pairs[position] for position in splits[name]] for name in ("train", "val"))
    return train, held
