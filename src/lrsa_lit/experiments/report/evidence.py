"""What compression costs before any answer: perplexity, supporting tokens that are dropped, and in which layers."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

from lrsa_lit.evaluation import statistics
from lrsa_lit.evaluation.statistics import Estimate
from lrsa_lit.experiments.report import columns
from lrsa_lit.experiments.report.cells import Cell, Cells, Table, measure_of
from lrsa_lit.experiments.report.columns import Column, Grid


class Text(NamedTuple):
    """A cell on a data set without answers, and its loss (nats for each token)."""

    data_set: str
    cell: Cell
    loss: Estimate


class Survival(NamedTuple):
    """A trained cell (``after``), and the base LLM under the same attention (``before``)."""

    data_set: str
    before: Cell
    after: Cell

    @property
    def chance(self) -> float:
        """K/L: what a head keeps that does not look."""
        return float(self.after.line["survival"]["chance"])


class LayerGain(NamedTuple):
    """The fall of a row's loss (nats for each token) by one more dense layer, beside those that are dense already."""

    row: str
    attention: str
    base: tuple[int, ...]
    layer: int
    gain: Estimate


def texts(cells: Cells) -> list[Text]:
    """All cells on data sets without answers, on their test splits."""
    names = [name for name in cells.study.data_sets if measure_of(cells.study, name) == "loss"]
    return [Text(name, cell, cell.estimate("loss")) for name in names for cell in cells.on(name).cells()]


def perplexity(cells: Cells) -> Grid:
    """A row for each cell: the share of pairs kept, and the perplexity."""
    found = texts(cells)
    own = [text.cell for text in found]
    losses = Column("perplexity", [text.loss for text in found], columns.perplexity)
    names = Column("text", [text.data_set for text in found])
    return Grid([names, *columns.about(own), *columns.shares(own), losses], names=3)


def pairs(cells: Cells) -> list[Survival]:
    """Cells of trained rows on test splits whose selections were looked at, and the base LLM's as well."""
    found: list[Survival] = []
    for data_set in cells.study.data_sets:
        looked = [cell for cell in cells.on(data_set).cells() if cell.survival("gold") is not None]
        before = {cell.key[1]: cell for cell in looked if not cells.study.row(cell.row).steps}
        found += [
            Survival(data_set, before[cell.key[1]], cell)
            for cell in looked
            if cells.study.row(cell.row).steps and cell.key[1] in before
        ]
    return found


def survival(cells: Cells) -> Grid:
    """A row for each trained cell: the share of supporting and answer tokens that a head keeps, before and after.

    Last stands what is kept of each quarter of a partition after training, where results say so.
    """
    found = pairs(cells)
    shown = [
        Column("questions", [item.data_set for item in found]),
        *columns.about([item.after for item in found])[:2],
        Column("chance", [item.chance for item in found], columns.share),
    ]
    for evidence in ("gold", "answer"):
        for when in ("before", "after"):
            kept = [getattr(item, when).survival(evidence) for item in found]
            shown.append(Column(f"{evidence} {when}", kept, columns.share))
    quarters = [item.after.survival("quarters") for item in found]
    if any(quarters):
        shown.append(Column("by quarter", quarters, lambda shares: " ".join(map(columns.share, shares))))
    return Grid(shown, names=3)


def layers(table: Table) -> list[LayerGain]:
    """What one more dense layer gains, under the same rule otherwise, in the order of the table.

    Where several cells have one layer less, a cell is held against the one that most cells can be held against.
    """
    both = ((cell, base) for cell in table.cells for base in table.cells if _has_one_more(cell, base))
    pairs = [pair for cell, base in both if (pair := cell.paired(base)) is not None]
    uses = Counter(less.key for _, less in pairs)
    chosen: dict[tuple[str, str], tuple[Cell, Cell]] = {}
    for pair in sorted(pairs, key=lambda pair: -uses[pair[1].key]):
        chosen.setdefault(pair[0].key, pair)
    return [_gain(*chosen[cell.key]) for cell in table.cells if cell.key in chosen]


def _has_one_more(cell: Cell, base: Cell) -> bool:
    """Whether a cell is another one with one more dense layer, on the same questions."""
    rule, below = cell.line["rule"], base.line["rule"]
    if rule is None or below is None or {**below, "dense_layers": rule["dense_layers"]} != rule:
        return False
    dense, fewer = _dense_layers(cell), _dense_layers(base)
    one_more = fewer < dense and len(dense) == len(fewer) + 1
    return one_more and cell.row == base.row and cell.line["set_digest"] == base.line["set_digest"]


def _gain(more: Cell, less: Cell) -> LayerGain:
    fall = statistics.ratio_of_sums(less.scores("loss") - more.scores("loss"), more.scores("tokens"), more.groups)
    (layer,) = _dense_layers(more) - _dense_layers(less)
    return LayerGain(more.row, less.attention, tuple(sorted(_dense_layers(less))), layer, fall)


def _dense_layers(cell: Cell) -> set[int]:
    return set(cell.line["rule"]["dense_layers"])
