"""Tables, statistics and plots of a study's results, part by part."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lrsa_lit.errors import UserError
from lrsa_lit.study import statistics
from lrsa_lit.study.plan import DENSE, Evaluation, Row, Study
from lrsa_lit.study.results import Line, read_lines
from lrsa_lit.study.statistics import Comparison, Estimate, Scores


@dataclass(frozen=True)
class Cell:
    """A row under one attention on one data set, over its seeds.

    Attributes:
        row: name of the row.
        attention: name of the attention.
        lines: its results, one for each seed, on the same questions.
    """

    row: str
    attention: str
    lines: tuple[Line, ...]

    @property
    def line(self) -> Line:
        """Any of them, for what they have in common."""
        return self.lines[0]

    def scores(self, name: str) -> Scores:
        """(R, Q) of ``f1``, ``em``, ``recall``, ``loss`` or ``tokens``."""
        return np.array([line[name] for line in self.lines], dtype=np.float64)

    @property
    def kept(self) -> float:
        """Share of pairs kept: K/L in a sparse layer, 1 in a dense one; windows and sinks come on top."""
        rule, layers = self.line["rule"], self.line["layers"]
        if rule is None:
            return 1.0
        dense = len(rule["dense_layers"])
        return float((dense + (layers - dense) * rule["top_k"] / rule["lag_size"]) / layers)


@dataclass(frozen=True)
class Entry:
    """What a table says of a cell.

    Attributes:
        cell: the cell.
        score: mean of the data set's measure.
        of_dense: against dense training with dense inference.
        of_same: against dense training under the same attention; None for dense training itself.
        of_named: against the row and attention that the part names.
    """

    cell: Cell
    score: Estimate
    of_dense: Comparison | None
    of_same: Comparison | None
    of_named: Comparison | None


class Table:
    """The results of a part on one data set.

    Args:
        study: the study.
        part: name of the part.
        data_set: name of the data set.
        lines: all results.
    """

    def __init__(self, study: Study, part: str, data_set: str, lines: Sequence[Line]) -> None:
        self.study, self.part, self.data_set = study, part, data_set
        self.split = study.parts[part].get("split", "test")
        self.generated = study.generates(data_set, part)
        self.measure = study.data_sets[data_set].get("measure", "f1") if self.generated else "loss"
        self.against: tuple[str, str] | None = None
        if (named := study.parts[part].get("against")) is not None:
            self.against = named["row"], named["inference"]
        self._lines = lines
        self.cells = list(self._cells())

    def entries(self) -> list[Entry]:
        """One for each cell that has results, in the order of the part."""
        return [self._entry(cell) for cell in self.cells]

    def _cells(self) -> Iterator[Cell]:
        asked: dict[str, dict[str, Evaluation]] = {}
        for work in self.study.work(self.part):
            for item in work.evaluations:
                if item.data_set == self.data_set:
                    asked.setdefault(work.row.name, {})[item.name] = item
        for name, items in asked.items():
            for item in items.values():
                if (cell := self._cell(self.study.row(name), item.name, item.rule_digest)) is not None:
                    yield cell

    def _cell(self, row: Row, attention: str, rule_digest: str) -> Cell | None:
        found = [line for line in self._of(row) if line["rule_digest"] == rule_digest]
        # Answers to other questions, and after training on others, of a former version of the data, stay out.
        data = ("set_digest", "train_digest")
        same = [line for line in found if all(line[name] == found[-1][name] for name in data)]
        # A seed whose losses came first and whose answers later has two.
        seeds = {line["seed"]: line for line in same}
        return Cell(row.name, attention, tuple(seeds.values())) if seeds else None

    def _of(self, row: Row) -> list[Line]:
        of_set = {"kind": "evaluation", "config": row.hash, "set": self.data_set, "split": self.split}
        of_set |= {"generated": True} if self.generated else {}
        return [line for line in self._lines if all(line.get(name) == value for name, value in of_set.items())]

    def _entry(self, cell: Cell) -> Entry:
        scores = cell.scores(self.measure)
        if self.measure == "loss":
            return Entry(cell, statistics.ratio_of_sums(scores, cell.scores("tokens")), None, None, None)
        row = reference_of(self.study, self.study.row(cell.row))
        dense = same = None
        if row is not None:
            dense = self._cell(row, "dense", DENSE)
            same = self._cell(row, cell.attention, cell.line["rule_digest"]) if row.name != cell.row else None
        others = [self._against(cell, other) for other in (dense, same, self._named())]
        return Entry(cell, statistics.mean(scores), *others)

    def _named(self) -> Cell | None:
        if self.against is None:
            return None
        row, attention = self.study.row(self.against[0]), self.against[1]
        rule = self.study.rule_of(self.part, row, attention)
        return self._cell(row, attention, DENSE if rule is None else rule.digest())

    def _against(self, cell: Cell, other: Cell | None) -> Comparison | None:
        if other is None or other.lines == cell.lines or other.line["set_digest"] != cell.line["set_digest"]:
            return None
        return statistics.compare(cell.scores(self.measure), other.scores(self.measure))


def reference_of(study: Study, row: Row) -> Row | None:
    """The dense training that a row is held against: one that differs in the attention alone, else in the rate too."""
    dense = [other for other in study.rows.values() if other.rule is None and other.steps]
    for ignored in (("attention", "train_top_k"), ("attention", "train_top_k", "optimizer", "lr_scheduler")):
        for other in dense:
            mine, its = row.trained_by(), other.trained_by()
            if all(mine.get(name) == its[name] for name in its if name not in ignored):
                return other
    return dense[0] if dense and row.steps == 0 else None


def write_report(study: Study, results: Path, folder: Path, mlflow: str | None = None) -> None:
    """Write ``report.md`` and its plots, and fill a store of MLflow if asked to.

    Args:
        study: the study, for its parts and their order.
        results: file of the results.
        folder: where the report goes.
        mlflow: URI of the store.

    Raises:
        UserError: there are no results.
    """
    lines = read_lines(results)
    if not lines:
        raise UserError(f"{results}: it holds no results")
    folder.mkdir(parents=True, exist_ok=True)
    texts = [f"# Results of {Path(study.name).stem}", "", *_head(lines)]
    for part in study.parts:
        for data_set in study.parts[part]["sets"]:
            table = Table(study, part, data_set, lines)
            if not table.cells:
                continue
            entries = table.entries()
            texts += ["", f"## {part}: {data_set} ({table.split})", "", *markdown(table, entries)]
            if table.measure != "loss":
                from lrsa_lit.study.plots import against_share

                name = f"{part}-{data_set}.png"
                against_share(entries, table.measure, f"{part}: {data_set}").savefig(folder / name, dpi=120)
                texts += ["", f"![{table.measure} against the share of attended pairs]({name})"]
    texts += ["", "## Training", "", *_training(study, lines)]
    (folder / "report.md").write_text("\n".join(texts) + "\n", encoding="utf-8")
    print(f"{folder / 'report.md'}", flush=True)
    if mlflow is not None:
        from lrsa_lit.study.export import to_mlflow

        to_mlflow(study, lines, mlflow)


def markdown(table: Table, entries: Iterable[Entry]) -> list[str]:
    """The rows of a Markdown table."""
    if table.measure == "loss":
        head = ["trained", "inference", "seeds", "kept", "pairs", "loss", "perplexity"]
        body = [
            [*_names(entry), _interval(entry.score, 3), _interval(Estimate(*map(math.exp, entry.score)), 2)]
            for entry in entries
        ]
        return _rows(head, body)
    label = {"f1": "F1", "recall": "recall", "em": "exact match"}[table.measure]
    head = ["trained", "inference", "seeds", "kept", "pairs", label, "exact match", "loss", "of dense", "gold kept"]
    entries = list(entries)
    body = []
    for entry in entries:
        cell = entry.cell
        loss = cell.scores("loss").sum() / cell.scores("tokens").sum()
        ratio = _percent(entry.of_dense.ratio) if entry.of_dense else ""
        middle = [_interval(entry.score, 3), f"{cell.scores('em').mean():.3f}", f"{loss:.3f}"]
        body.append([*_names(entry), *middle, ratio, _survival(cell)])
    for title, compared in _comparisons(table, entries):
        head += [f"less {title}", "p", "Holm"]
        adjusted = iter(statistics.holm([found.p_value for found in compared if found is not None]))
        for row, found in zip(body, compared, strict=True):
            p_values = [f"{found.p_value:.4f}", f"{next(adjusted):.4f}"] if found else ["", ""]
            row += [_interval(found.difference, 3, "+") if found else "", *p_values]
    return _rows(head, body)


def _comparisons(table: Table, entries: Sequence[Entry]) -> Iterator[tuple[str, list[Comparison | None]]]:
    """What the rows are held against, as far as there is something."""
    named = f"{table.against[0]}, {table.against[1]}" if table.against else ""
    yield "dense-trained", [entry.of_same for entry in entries]
    if table.against:
        yield named, [entry.of_named for entry in entries]


def _names(entry: Entry) -> list[str]:
    cell = entry.cell
    return [cell.row, cell.attention, str(len(cell.lines)), f"{cell.kept:.0%}", f"{cell.line['kv_share']:.0%}"]


def _survival(cell: Cell) -> str:
    kept = [line["survival"]["gold"] for line in cell.lines if line.get("survival")]
    known = [share for share in kept if share is not None]
    return f"{np.mean(known):.0%}" if known else ""


def _head(lines: Sequence[Line]) -> list[str]:
    machines = sorted({", ".join(f"{key} {value}" for key, value in line["machine"].items()) for line in lines})
    return [
        "Brackets are 95 % intervals, of questions drawn with all their seeds, and of seeds. *kept* is K/L in sparse "
        "layers and 1 in dense ones, *pairs* the share of query-key pairs attended to, sinks and windows included. *of "
        "dense* is the score by that of dense training with dense inference; *less dense-trained* the difference to "
        "dense training under the same attention, with the p-value of a paired permutation test of the "
        "questions, alone and adjusted for the tests of its column by Holm's method. "
        "*gold kept* is the share of the supporting passages' tokens that a head keeps.",
        "",
        *(f"- {machine}" for machine in machines),
    ]


def _training(study: Study, lines: Sequence[Line]) -> list[str]:
    body = []
    for line in lines:
        if line["kind"] == "training":
            speed, memory = line["tokens_per_second"], line["peak_memory_bytes"]
            body.append(
                [
                    line["row"],
                    str(line["seed"]),
                    str(line["steps"]),
                    f"{line['loss_of_last_20_steps']:.3f}",
                    f"{speed:,.0f}" if speed else "",
                    f"{memory / 2**30:.1f}" if memory else "",
                ]
            )
    return _rows(["trained", "seed", "steps", "loss of the last 20 steps", "tokens/s", "peak memory, GiB"], body)


def _rows(head: Sequence[str], body: Iterable[Sequence[str]]) -> list[str]:
    rule = "|".join("---" if number < 2 else "---:" for number in range(len(head)))
    return [f"| {' | '.join(head)} |", f"|{rule}|", *(f"| {' | '.join(row)} |" for row in body)]


def _interval(estimate: Estimate, digits: int, sign: str = "") -> str:
    value, low, high = (f"{number:{sign}.{digits}f}" for number in estimate)
    return f"{value} [{low}, {high}]"


def _percent(estimate: Estimate) -> str:
    if math.isnan(estimate.value):
        return ""
    return f"{estimate.value:.1%} [{estimate.low:.1%}, {estimate.high:.1%}]"
