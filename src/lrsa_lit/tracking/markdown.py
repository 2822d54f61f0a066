"""Markdown tables, for MLflow's notes and TensorBoard's texts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from lrsa_lit.errors import printable


def markdown(titles: Sequence[str], rows: Iterable[Sequence[Any]], align: str = "---") -> str:
    """A Markdown table with escaped cells."""
    lines = [titles, [align] * len(titles), *rows]
    shown = [[cell if cell == align else escaped(str(cell)) for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in shown)


def escaped(text: str) -> str:
    """Escape a text for a cell of a Markdown table, as one line."""
    return "".join(f"\\{letter}" if letter in "|[]<>`*_\\" else letter for letter in printable(" ".join(text.split())))
