"""The report of a comparison: tables of quality beside what each system takes, and quality against cache bytes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from lrsa_lit.experiments.comparison import system_and_budget
from lrsa_lit.experiments.report import columns, result_plots
from lrsa_lit.experiments.report.cells import Cell, Cells, Table
from lrsa_lit.experiments.report.columns import Column, Grid
from lrsa_lit.experiments.report.tables import LABELS
from lrsa_lit.experiments.results import Line
from lrsa_lit.experiments.study import DENSE, Study
from lrsa_lit.io import write_atomically

LEGEND = """\
All numbers are measured. *kept*: K/L of the rule, with dense layers whole; of a system the pairs that it holds.
*cache*: bytes held at the end of the prompt as a share of what a dense cache holds of it, sinks, windows, dense layers
and waiting queries among them; memory that is made for later tokens does not count. *peak*: the most that was held in
prefill. *pairs*: attended query-key pairs of the prompt. *read*: bytes that a token of the answer reads. Seconds are
medians over batches, and depend on their size and on the machine. A budget is met for a prompt of max_tokens tokens.
Systems that cut a prompt once do so behind the context, before they see the question, which they then hold in full
within the budget; those marked *[q]* cut behind the question, which can decide what they keep."""


class Section(NamedTuple):
    """A data set's results.

    Attributes:
        at_budgets: dense attention, and what was set to budgets.
        holding: what holds everything.
        figure: quality against the bytes of the cache, a file beside the report.
    """

    title: str
    at_budgets: Grid
    holding: Grid
    figure: Path


def write(study: Study, lines: Sequence[Line], folder: Path) -> list[Section]:
    """Write ``README.md`` and a plot of each data set into a folder; returns the tables."""
    sections, texts = [], [f"# {study.title}", "", LEGEND]
    for part in study.parts:
        table = Table(Cells(study, lines), part, part)
        section = _section(table, folder)
        sections.append(section)
        texts += ["", f"## {section.title}", "", section.at_budgets.markdown(), "", f"![]({section.figure.name})"]
        if holding := section.holding.markdown():
            texts += ["", "These hold everything, and read or attend to less:", "", holding]
    write_atomically(folder / "README.md", lambda file: file.write(("\n".join(texts) + "\n").encode()))
    return sections


def _section(table: Table, folder: Path) -> Section:
    cells = {cell.attention: cell for cell in table.cells}
    dense = cells.get(DENSE)
    budgets = {name: cell for name, cell in cells.items() if name == DENSE or system_and_budget(name)[1] is not None}
    others = {name: cell for name, cell in cells.items() if name not in budgets}
    about = next(iter(cells.values())).line
    title = f"{table.data_set}: {LABELS[table.measure]}, {about['questions']} questions, {about['row']}"
    figure = result_plots.against_cache(
        [(system_and_budget(name)[0], _taken(cell, "cache") or 0.0, cell.estimate(table.measure))
         for name, cell in budgets.items()], LABELS[table.measure], title)  # fmt: skip
    path = folder / f"{table.data_set}.png"
    figure.savefig(path, dpi=120)
    return Section(title, _grid(table, budgets, dense), _grid(table, others, dense, "read"), path)


def _grid(table: Table, cells: dict[str, Cell], dense: Cell | None, *more: str) -> Grid:
    names, shown = [system_and_budget(name) for name in cells], list(cells.values())
    compared = [cell.compared(dense, table.measure) for cell in shown]

    def taken(key: str, title: str = "") -> Column:
        return Column(title or key, [_taken(cell, key) for cell in shown], columns.share)

    def milliseconds(key: str, title: str) -> Column:
        return Column(title, [_taken(cell, key) for cell in shown], lambda value: f"{1000 * value:.1f}")

    return Grid(
        [
            Column("system", [name for name, _ in names]),
            Column("budget", [budget for _, budget in names], columns.share),
            Column(LABELS[table.measure], [cell.estimate(table.measure) for cell in shown], columns.interval),
            Column("minus dense", [item and item.difference for item in compared], columns.signed),
            *(taken(key) for key in (*more, "kept", "cache", "peak", "pairs")),
            milliseconds("first_token_seconds", "first token, ms"),
            milliseconds("token_seconds", "token, ms"),
        ],
        names=1,
    )


def _taken(cell: Cell, key: str) -> float | None:
    measured = cell.line.get("measured") or {}
    found: float | None = measured.get(key, measured.get("cache") if key == "read" else None)
    return found
