"""Tables of results: Markdown for documents, frames of pandas for notebooks."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import pandas as pd

from lrsa_lit.errors import printable
from lrsa_lit.evaluation.statistics import Estimate
from lrsa_lit.experiments.report.cells import Cell


class Column(NamedTuple):
    """A column: its values, None where there is none; what documents (``show``) and frames (``number``) make of one."""

    title: str
    values: Sequence[Any]
    show: Callable[[Any], str] = str
    number: Callable[[Any], Any] = lambda value: value


class Grid(NamedTuple):
    """A table: its columns, of which the first ones, so many as ``names``, stand to the left."""

    columns: Sequence[Column]
    names: int = 2

    def markdown(self) -> str:
        """The table as documents have it; nothing where it has no rows."""
        shown = [["" if value is None else column.show(value) for value in column.values] for column in self.columns]
        rule = "|".join("---" if number < self.names else "---:" for number in range(len(shown)))
        titles = [column.title for column in self.columns]
        head, *body = (f"| {' | '.join(map(plain, row))} |" for row in (titles, *zip(*shown, strict=True)))
        return "\n".join([head, f"|{rule}|", *body]) if body else ""

    def frame(self, *, intervals: bool = True) -> pd.DataFrame:
        """The values, each estimate with the ends of its interval beside it in ``NAME low`` and ``NAME high``."""
        series: list[pd.Series[Any]] = []
        for column in self.columns:
            values = [None if value is None else column.number(value) for value in column.values]
            parts = {"": [value.value if isinstance(value, Estimate) else value for value in values]}
            if intervals and any(isinstance(value, Estimate) for value in values):
                parts |= {f" {end}": [getattr(value, end, None) for value in values] for end in ("low", "high")}
            series += [pd.Series(part, name=column.title + end) for end, part in parts.items()]
        return pd.concat(series, axis="columns")


def about(cells: Sequence[Cell]) -> list[Column]:
    """What each table says of its cells first: how they were trained and used, with how many seeds."""
    return [
        Column("trained", [cell.row for cell in cells]),
        Column("inference", [cell.attention for cell in cells]),
        Column("seeds", [len(cell.lines) for cell in cells]),
    ]


def shares(cells: Sequence[Cell]) -> list[Column]:
    """How much of the pairs each cell keeps, and attends to; and of the bytes it holds, where any was measured."""
    names = ["kept", "pairs"] + ["cache"] * any(cell.line.get("measured") for cell in cells)
    return [Column(name, [getattr(cell, name) for cell in cells], share) for name in names]


def plain(text: str) -> str:
    """Text as Markdown shows it, within one line: names in results are those of devices, commits, rows and data."""
    # A space after it, and it begins no element.
    escaped = html.escape(text, quote=False).replace("&lt; ", "< ").replace("|", "\\|")
    return printable("<br>".join(escaped.split("\n")))


def interval(estimate: Estimate, form: str = ".3f") -> str:
    """``0.412 [0.380, 0.444]``; nothing for NaN."""
    value, low, high = (format(number, form) for number in estimate)
    return "" if math.isnan(estimate.value) else f"{value} [{low}, {high}]"


signed = partial(interval, form="+.3f")
percent = partial(interval, form=".1%")


def perplexity(loss: Estimate) -> str:
    """Of a loss in nats for each token."""
    return interval(loss.exp(), ".2f")


def share(value: float) -> str:
    """``25%``, ``12.5%``."""
    return f"{100 * value:.1f}".removesuffix(".0") + "%"


def seeds(count: int) -> str:
    """How many there are, in words."""
    return "1 seed" if count == 1 else f"{count} seeds"
