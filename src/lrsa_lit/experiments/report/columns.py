"""Tables of results, as Markdown for documents and as pandas data frames for notebooks."""

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
    """A column: its values, None for an empty cell; ``show`` formats a value for Markdown, ``number`` for a frame."""

    title: str
    values: Sequence[Any]
    show: Callable[[Any], str] = str
    number: Callable[[Any], Any] = lambda value: value


class Grid(NamedTuple):
    """A table: its columns, of which the first ``names`` are left-aligned."""

    columns: Sequence[Column]
    names: int = 2

    def markdown(self) -> str:
        """The table in Markdown; empty if it has no rows."""
        shown = [["" if value is None else column.show(value) for value in column.values] for column in self.columns]
        rule = "|".join("---" if number < self.names else "---:" for number in range(len(shown)))
        titles = [column.title for column in self.columns]
        head, *body = (f"| {' | '.join(map(plain, row))} |" for row in (titles, *zip(*shown, strict=True)))
        return "\n".join([head, f"|{rule}|", *body]) if body else ""

    def frame(self, *, intervals: bool = True) -> pd.DataFrame:
        """The values as a data frame; ends of intervals are in the columns ``NAME low`` and ``NAME high``."""
        series: list[pd.Series[Any]] = []
        for column in self.columns:
            values = [None if value is None else column.number(value) for value in column.values]
            parts = {"": [value.value if isinstance(value, Estimate) else value for value in values]}
            if intervals and any(isinstance(value, Estimate) for value in values):
                parts |= {f" {end}": [getattr(value, end, None) for value in values] for end in ("low", "high")}
            series += [pd.Series(part, name=column.title + end) for end, part in parts.items()]
        return pd.concat(series, axis="columns")


def about(cells: Sequence[Cell]) -> list[Column]:
    """The first columns of each table: the cells' training, inference and number of seeds."""
    return [
        Column("trained", [cell.row for cell in cells]),
        Column("inference", [cell.attention for cell in cells]),
        Column("seeds", [len(cell.lines) for cell in cells]),
    ]


def shares(cells: Sequence[Cell]) -> list[Column]:
    """The shares of pairs that each cell keeps and attends to, and of cache bytes if any cell measured them."""
    names = ["kept", "pairs"] + ["cache"] * any(cell.line.get("measured") for cell in cells)
    return [Column(name, [getattr(cell, name) for cell in cells], share) for name in names]


def plain(text: str) -> str:
    """Escape text for one line of Markdown."""
    # "<" followed by a space does not start an HTML element, so it stays readable.
    escaped = html.escape(text, quote=False).replace("&lt; ", "< ").replace("|", "\\|")
    return printable("<br>".join(escaped.split("\n")))


def interval(estimate: Estimate, form: str = ".3f") -> str:
    """Format an estimate as ``0.412 [0.380, 0.444]``; empty for NaN."""
    value, low, high = (format(number, form) for number in estimate)
    return "" if math.isnan(estimate.value) else f"{value} [{low}, {high}]"


signed = partial(interval, form="+.3f")
percent = partial(interval, form=".1%")
hundredths = partial(interval, form=".2f")


def share(value: float) -> str:
    """Format a share as ``25%`` or ``12.5%``."""
    return f"{100 * value:.1f}".removesuffix(".0") + "%"


def seeds(count: int) -> str:
    """Format a number of seeds as ``1 seed`` or ``3 seeds``."""
    return "1 seed" if count == 1 else f"{count} seeds"
