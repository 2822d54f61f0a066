"""The generated blocks of a study's documents, by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path

from matplotlib.figure import Figure

from lrsa_lit.errors import UserError
from lrsa_lit.experiments.report import evidence, markdown, places, plots
from lrsa_lit.experiments.report.bars import Bars, Best
from lrsa_lit.experiments.report.tables import Cell, Cells, Table
from lrsa_lit.study.plan import Study
from lrsa_lit.study.results import Line
from lrsa_lit.study.settings import Settings

FORMS = "PART, PART/SET, PART/SET/plot, PART/SET/places"
"""Blocks of a part: its matrices, all of one data set, its plot, and its scores by the place of the answer."""

_CAPTIONS = {"perplexity/plot": "perplexity against the share of pairs kept",
             "survival/plot": "supporting tokens kept, before and after training"}  # fmt: skip

_PLOT, _PLACES = "/plot", "/places"


class Blocks:
    """Texts and plots of the results.

    Args:
        study: the study.
        lines: its results.
        data: folder of its token files, for the blocks that look at the questions.
    """

    def __init__(self, study: Study, lines: Sequence[Line], data: Path | None = None) -> None:
        self.study, self.lines, self.data = study, lines, data
        self.cells = Cells(study, lines)
        self._tables: dict[tuple[str, str], Table] = {}
        self._whole: dict[str, Callable[[], list[str]]] = {
            "summary": self._summary,
            "legend": lambda: [markdown.LEGEND],
            "bars": self._bars,
            "perplexity": lambda: evidence.perplexity(self.cells),
            "survival": lambda: evidence.survival(self.cells),
            "training": lambda: markdown.training(self.cells.lines),
            "machines": lambda: markdown.machines(lines),
        }
        self._plots: dict[str, Callable[[], Figure | None]] = {
            "perplexity/plot": lambda: plots.perplexity(evidence.texts(self.cells)),
            "survival/plot": lambda: plots.survival(evidence.pairs(self.cells)),
        }

    @cached_property
    def bars(self) -> Bars:
        """The study's bars."""
        return Bars(self.cells)

    def table(self, part: str, data_set: str) -> Table:
        """A part on one data set."""
        if (part, data_set) not in self._tables:
            self._tables[part, data_set] = Table(self.cells, part, data_set)
        return self._tables[part, data_set]

    def text(self, name: str) -> str:
        """The Markdown of a block, empty where there are no results yet.

        Raises:
            UserError: there is no such block, or it needs the data.
        """
        if name in self._whole:
            return "\n".join(self._whole[name]())
        if name.endswith(_PLACES):
            table = self.table(*self._one(name, _PLACES))
            return "\n".join(places.table_of(places.by_place(table, self.data))) if table.cells else ""
        part, data_set = self._part(name)
        if data_set:
            table = self.table(part, data_set)
            return "\n".join([*_counted(table), *markdown.full(table)]) if table.cells else ""
        tables = [self.table(part, each) for each in self.study.parts[part]["sets"]]
        return "\n\n".join("\n".join(_headed(table)) for table in tables if table.cells)

    def figure(self, name: str) -> Figure | None:
        """The plot of a block whose name ends in ``/plot``; None where there are no results yet.

        Raises:
            UserError: there is no such block.
        """
        if name in self._plots:
            return self._plots[name]()
        part, data_set = self._one(name, _PLOT)
        if not self.study.generates(data_set):
            # The texts of all parts stand in one plot of their own.
            return None
        table, title = self.table(part, data_set), f"{part}: {data_set}"
        if table.measure == "loss":
            return plots.layers(evidence.layers(table), title)
        return plots.against_share(table.entries, table.measure, title) if table.cells else None

    def caption(self, name: str) -> str:
        """What a plot shows, in words.

        Raises:
            UserError: there is no such plot.
        """
        if name in _CAPTIONS:
            return _CAPTIONS[name]
        part, data_set = self._one(name, _PLOT)
        about = "the score against the share of pairs attended to"
        if not self.study.generates(data_set):
            about = "perplexity"
        elif not self.study.generates(data_set, part):
            about = "what each dense layer gains"
        return f"{part}/{data_set}: {about}"

    def _one(self, name: str, ending: str) -> tuple[str, str]:
        part, data_set = self._part(name.removesuffix(ending))
        if not data_set:
            raise self._unknown(name)
        return part, data_set

    def _part(self, name: str) -> tuple[str, str]:
        part, _, data_set = name.partition("/")
        if part not in self.study.parts or (data_set and data_set not in self.study.parts[part]["sets"]):
            raise self._unknown(name)
        if name.endswith("/"):
            raise self._unknown(name)
        return part, data_set

    def _unknown(self, name: str) -> UserError:
        allowed = [*self._whole, *self._plots, FORMS]
        return UserError(
            f"there is no block {name!r}; there are {', '.join(allowed)} with PART one of {', '.join(self.study.parts)}"
        )

    def _bars(self) -> list[str]:
        verdicts = self.bars.verdicts()
        if all(item.verdict == "open" for item in verdicts):
            return []
        body = [[item.name, item.required, item.reached, item.verdict, item.by] for item in verdicts]
        return markdown.rows_of(["bar", "required", "reached", "verdict", "by"], body, names=5)

    def _summary(self) -> list[str]:
        """The best of each budget beside dense training, compressed at inference only."""
        bars = {name: bar for name, bar in self.study.bars.items() if "of_dense" in bar}
        found = {name: best for name, bar in bars.items() if (best := self.bars.best(bar)) is not None}
        # What is the best of several budgets stands once: at the smallest one of kept pairs, else of all pairs.
        smallest: dict[tuple[str, str, str], str] = {}
        for name in sorted(found, key=lambda name: ("pairs" in bars[name], _budget(bars[name]))):
            smallest.setdefault((found[name].cell.row, found[name].cell.attention, bars[name]["set"]), name)
        shown = set(smallest.values())
        body = [self._row(name, self.bars.measure(bars[name]), best) for name, best in found.items() if name in shown]
        scores = ["dense", "dense-trained, compressed", "LRSA-trained, compressed", "of dense"]
        head = ["", "measure", *scores, "kept", "pairs", "seeds"]
        return [*markdown.rows_of(head, body, names=2), "", markdown.SHARES] if body else []

    @staticmethod
    def _row(name: str, measure: str, best: Best) -> list[str]:
        seeds = len(best.cell.lines)
        shown = [_mean(cell, measure, seeds) for cell in (best.reference, best.same, best.cell)]
        shares = [markdown.share(best.cell.kept), markdown.share(best.cell.pairs)]
        return [name, markdown.LABELS[measure], *shown, markdown.percent(best.ratio), *shares, str(seeds)]


def _mean(cell: Cell | None, measure: str, seeds: int) -> str:
    """A cell's score, with its seeds where it has fewer than others of its row."""
    if cell is None:
        return ""
    fewer = f" ({markdown.seeds(len(cell.lines))})" if len(cell.lines) < seeds else ""
    return f"{cell.mean(measure):.3f}{fewer}"


def _budget(bar: Settings) -> float:
    return float(bar["kept"] if "kept" in bar else bar["pairs"])


def _counted(table: Table) -> list[str]:
    """How many of the results of a part there are, where some are missing."""
    return [f"{table.done} of {table.asked} results are in.", ""] if table.done < table.asked else []


def _headed(table: Table) -> list[str]:
    title = f"{table.data_set} ({table.split}), {markdown.LABELS[table.measure]}"
    body = _counted(table)
    return [f"**{title}**", "", *body, *markdown.matrix(table)]
