"""What compression costs before any answer: perplexity, supporting tokens that are dropped, and in which layers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Literal, NamedTuple

from lrsa_lit.evaluation import statistics
from lrsa_lit.evaluation.statistics import Estimate
from lrsa_lit.experiments.report import markdown
from lrsa_lit.experiments.report.tables import Cell, Cells, Table, measure_of, of_common_seeds, score_of

WHEN: tuple[Literal["before", "after"], ...] = ("before", "after")


class Text(NamedTuple):
    """A cell on a data set without answers, and its loss (nats for each token)."""

    data_set: str
    cell: Cell
    loss: Estimate


class Survival(NamedTuple):
    """A trained cell, and the base LLM under the same attention."""

    data_set: str
    before: Cell
    after: Cell

    @property
    def chance(self) -> float:
        """K/L: what a head keeps that does not look."""
        return float(self.after.line["survival"]["chance"])

    def share(self, when: Literal["before", "after"], evidence: str = "gold") -> float | None:
        """What a head keeps of the ``gold`` or ``answer`` tokens."""
        cell = self.before if when == "before" else self.after
        return cell.survival(evidence)


class LayerGain(NamedTuple):
    """What one more dense layer is worth.

    Attributes:
        row: name of the row.
        attention: name of the attention without it.
        base: the layers that are dense there, ascending.
        layer: the one more.
        gain: the fall of the loss, nats for each token.
    """

    row: str
    attention: str
    base: tuple[int, ...]
    layer: int
    gain: Estimate


def texts(cells: Cells) -> list[Text]:
    """All cells on data sets without answers, on their test splits."""
    names = [name for name in cells.study.data_sets if measure_of(cells.study, name) == "loss"]
    return [Text(name, cell, score_of(cell, "loss")) for name in names for cell in cells.on(name, "test")]


def perplexity(cells: Cells) -> list[str]:
    """A row for each cell: the share of pairs kept, and the perplexity."""
    body = []
    for data_set, cell, loss in texts(cells):
        shares = [markdown.share(cell.kept), markdown.share(cell.pairs)]
        body.append([data_set, cell.row, cell.attention, str(len(cell.lines)), *shares, markdown.perplexity(loss)])
    head = ["text", "trained", "inference", "seeds", "kept", "pairs", "perplexity"]
    return markdown.rows_of(head, body, names=3) if body else []


def pairs(cells: Cells) -> list[Survival]:
    """Cells of trained rows on test splits whose selections were looked at, and the base LLM's as well."""
    return list(_pairs(cells))


def _pairs(cells: Cells) -> Iterator[Survival]:
    for data_set in cells.study.data_sets:
        measure = measure_of(cells.study, data_set)
        found = [cell for cell in cells.on(data_set, "test", measure) if cell.survival("gold") is not None]
        steps = {cell.row: cells.study.row(cell.row).steps for cell in found}
        before = {cell.line["rule_digest"]: cell for cell in found if not steps[cell.row]}
        for cell in found:
            if steps[cell.row] and (base := before.get(cell.line["rule_digest"])):
                yield Survival(data_set, base, cell)


def survival(cells: Cells) -> list[str]:
    """A row for each trained cell: the share of supporting and answer tokens that a head keeps, before and after.

    Last stands what is kept of each quarter of a partition after training, where results say so.
    """
    body = []
    for item in pairs(cells):
        names = [item.data_set, item.after.row, item.after.attention]
        shares = [item.share(when, evidence) for evidence in ("gold", "answer") for when in WHEN]
        quarters = " ".join(markdown.share(share) for share in item.after.quarters or [])
        body.append([*names, markdown.share(item.chance), *map(markdown.share, shares), quarters])
    head = ["questions", "trained", "inference", "chance", "gold before", "gold after", "answer before", "answer after"]
    if any(row[-1] for row in body):
        head.append("by quarter")
    return markdown.rows_of(head, [row[: len(head)] for row in body], names=3) if body else []


def layers(table: Table) -> list[LayerGain]:
    """What one more dense layer gains, under the same rule otherwise, in the order of the table.

    Where several cells have one layer less, a cell is held against the one that most cells can be held against.
    """
    both = ((cell, base) for cell in table.cells for base in table.cells if _has_one_more(cell, base))
    pairs = [pair for cell, base in both if (pair := of_common_seeds(cell, base)) is not None]
    uses = Counter(_key(less) for _, less in pairs)
    chosen: dict[tuple[str, str], tuple[Cell, Cell]] = {}
    for pair in sorted(pairs, key=lambda pair: -uses[_key(pair[1])]):
        chosen.setdefault(_key(pair[0]), pair)
    return [_gain(*chosen[_key(cell)]) for cell in table.cells if _key(cell) in chosen]


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


def _key(cell: Cell) -> tuple[str, str]:
    return cell.row, cell.line["rule_digest"]


def _dense_layers(cell: Cell) -> set[int]:
    return set(cell.line["rule"]["dense_layers"])
