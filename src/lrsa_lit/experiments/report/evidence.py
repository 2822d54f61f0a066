"""Effects of compression apart from answers: perplexity, kept supporting tokens, and the gain of dense layers."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

from lrsa_lit.evaluation import statistics
from lrsa_lit.evaluation.statistics import Estimate
from lrsa_lit.experiments.report import columns
from lrsa_lit.experiments.report.cells import Cell, Cells, Table, measure_of
from lrsa_lit.experiments.report.columns import Column, Grid


class LayerGain(NamedTuple):
    """The decrease of a row's loss (nats per token) by one more dense layer; ``base`` are the other dense layers."""

    row: str
    attention: str
    base: tuple[int, ...]
    layer: int
    gain: Estimate


def texts(cells: Cells) -> list[Cell]:
    """All cells on the test splits of data sets without answers."""
    names = [name for name in cells.study.data_sets if measure_of(cells.study, name) == "loss"]
    return [cell for name in names for cell in cells.on(name).cells()]


def perplexity(cells: Cells) -> Grid:
    """A row per cell: the share of pairs kept, and the perplexity."""
    found = texts(cells)
    names = Column("text", [cell.line["set"] for cell in found])
    values = Column("perplexity", [cell.estimate("loss").exp() for cell in found], columns.hundredths)
    return Grid([names, *columns.about(found), *columns.shares(found), values], names=3)


def pairs(cells: Cells) -> list[tuple[Cell, Cell]]:
    """Pairs of the base LLM and a trained row under the same attention, on test splits with recorded selections."""
    found: list[tuple[Cell, Cell]] = []
    for data_set in cells.study.data_sets:
        looked = [cell for cell in cells.on(data_set).cells() if cell.survival("gold") is not None]
        before = {cell.key[1]: cell for cell in looked if not cells.study.row(cell.row).steps}
        trained = [cell for cell in looked if cells.study.row(cell.row).steps]
        found += [(before[cell.key[1]], cell) for cell in trained if cell.key[1] in before]
    return found


def survival(cells: Cells) -> Grid:
    """A row per trained cell: the share of supporting and answer tokens that a head keeps, before and after training.

    The last column is the share kept of each quarter of a partition after training, if the results have it.
    """
    found = pairs(cells)
    trained = [after for _, after in found]
    shown = [
        Column("questions", [cell.line["set"] for cell in trained]),
        *columns.about(trained)[:2],
        Column("chance", [cell.survival("chance") for cell in trained], columns.share),
    ]
    for evidence in ("gold", "answer"):
        for when, own in (("before", [before for before, _ in found]), ("after", trained)):
            shown.append(Column(f"{evidence} {when}", [cell.survival(evidence) for cell in own], columns.share))
    quarters = [cell.survival("quarters") for cell in trained]
    if any(quarters):
        shown.append(Column("by quarter", quarters, lambda shares: " ".join(map(columns.share, shares))))
    return Grid(shown, names=3)


def layers(table: Table) -> list[LayerGain]:
    """The gain of one more dense layer under an otherwise equal rule, in the order of the table.

    If several cells have one dense layer less, each cell is compared with the one that most cells can be compared with.
    """
    both = ((cell, base) for cell in table.cells for base in table.cells if _has_one_more(cell, base))
    pairs = [pair for cell, base in both if (pair := cell.paired(base)) is not None]
    uses = Counter(less.key for _, less in pairs)
    chosen: dict[tuple[str, str], tuple[Cell, Cell]] = {}
    for pair in sorted(pairs, key=lambda pair: -uses[pair[1].key]):
        chosen.setdefault(pair[0].key, pair)
    return [_gain(*chosen[cell.key]) for cell in table.cells if cell.key in chosen]


def _has_one_more(cell: Cell, base: Cell) -> bool:
    """Whether ``cell`` equals ``base`` except for one more dense layer."""
    rule, below = cell.line["rule"], base.line["rule"]
    if rule is None or below is None or {**below, "dense_layers": rule["dense_layers"]} != rule:
        return False
    dense, fewer = set(rule["dense_layers"]), set(below["dense_layers"])
    return cell.row == base.row and fewer < dense and len(dense) == len(fewer) + 1


def _gain(more: Cell, less: Cell) -> LayerGain:
    fall = statistics.ratio_of_sums(less.scores("loss") - more.scores("loss"), more.scores("tokens"), more.groups)
    base = set(less.line["rule"]["dense_layers"])
    (layer,) = set(more.line["rule"]["dense_layers"]) - base
    return LayerGain(more.row, less.attention, tuple(sorted(base)), layer, fall)
