"""Tables of a study's results as Markdown."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Iterator, Sequence

from lrsa_lit.errors import printable
from lrsa_lit.evaluation import statistics
from lrsa_lit.evaluation.statistics import Comparison, Estimate
from lrsa_lit.experiments.report.tables import Cell, Entry, Table
from lrsa_lit.study.results import Line

LABELS = {"f1": "F1", "recall": "recall", "em": "exact match", "loss": "perplexity"}

SHARES = """\
*kept* is K/L in sparse layers and 1 in dense ones, *pairs* the share of query-key pairs attended to,
sinks and windows included."""

LEGEND = f"""\
Brackets are 95 % bootstrap intervals over questions; questions about one text are drawn together. With several seeds,
seeds are drawn too. Comparisons are over the seeds that both sides have, each of which takes the data in its own order;
one seed's interval knows nothing of other trainings.

{SHARES} *of dense* is the score by that of dense training, of as many steps on the same data
at the rate chosen for it, with dense inference; *minus dense-trained* the difference to dense training under the same
attention, with the p-value of a paired permutation test of the questions, alone and adjusted for the tests of its
column by Holm's method: whether these trained models differ, not whether others would. *gold kept* is the share of the
supporting passages' tokens that a head of a sparse layer keeps, of the first 16 questions."""


def matrix(table: Table) -> list[str]:
    """A row for each training and a column for each attention: the score, and its share of dense training."""
    attentions = table.attentions
    rows = dict.fromkeys(entry.cell.row for entry in table.entries)
    seeds = {row: max(len(entry.cell.lines) for entry in table.entries if entry.cell.row == row) for row in rows}
    body = [
        [row, str(seeds[row]), *(_matrix_cell(table, table.entry(row, name)) for name in attentions)] for row in rows
    ]
    return rows_of(["trained", "seeds", *attentions], body, names=1)


def _matrix_cell(table: Table, entry: Entry | None) -> str:
    if entry is None:
        return ""
    if table.measure == "loss":
        return perplexity(entry.score)
    ratio = f"\n{percent(entry.of_dense.ratio)}" if entry.of_dense else ""
    return interval(entry.score, 3) + ratio


def full(table: Table) -> list[str]:
    """A row for each cell, with all that is compared."""
    entries = table.entries
    if table.measure == "loss":
        head = ["trained", "inference", "seeds", "kept", "pairs", "loss", "perplexity"]
        body = [[*_names(entry.cell), interval(entry.score, 3), perplexity(entry.score)] for entry in entries]
        return rows_of(head, body)
    head = ["trained", "inference", "seeds", "kept", "pairs", LABELS[table.measure]]
    head += ["exact match", "loss", "of dense", "gold kept"]
    body = []
    for entry in entries:
        cell = entry.cell
        loss = cell.scores("loss").sum() / cell.scores("tokens").sum()
        ratio = percent(entry.of_dense.ratio) if entry.of_dense else ""
        middle = [interval(entry.score, 3), f"{cell.mean('em'):.3f}", f"{loss:.3f}"]
        body.append([*_names(cell), *middle, ratio, share(cell.survival("gold"))])
    for title, compared in _comparisons(table, entries):
        head += [f"minus {title}", "p", "Holm"]
        adjusted = iter(statistics.holm([found.p_value for found in compared if found is not None]))
        for row, found in zip(body, compared, strict=True):
            p_values = [f"{found.p_value:.4f}", f"{next(adjusted):.4f}"] if found else ["", ""]
            row += [interval(found.difference, 3, "+") if found else "", *p_values]
    return rows_of(head, body)


def _comparisons(table: Table, entries: Sequence[Entry]) -> Iterator[tuple[str, list[Comparison | None]]]:
    """What the rows are held against, as far as there is something."""
    yield "dense-trained", [entry.of_same for entry in entries]
    if table.against:
        yield f"{table.against[0]}, {table.against[1]}", [entry.of_named for entry in entries]


def training(lines: Sequence[Line]) -> list[str]:
    """Loss, speed, memory and time of each training, means of its seeds."""
    rows: dict[str, list[Line]] = {}
    for line in lines:
        if line["kind"] == "training":
            rows.setdefault(line["row"], []).append(line)
    body = []
    for row, own in rows.items():
        seconds, memory = _mean(own, "seconds"), _mean(own, "peak_memory_bytes")
        speed, loss = _mean(own, "tokens_per_second"), _mean(own, "loss_of_last_20_steps")
        steps = ", ".join(dict.fromkeys(str(line["steps"]) for line in own))
        measured = [
            _number(loss, ".3f"),
            _number(speed, ",.0f"),
            _number(memory, ".1f", 2**30),
            _number(seconds, ".1f", 60),
        ]
        body.append([row, str(len(own)), steps, *measured])
    head = ["trained", "seeds", "steps", "loss of the last 20 steps", "tokens/s", "peak memory, GiB", "minutes"]
    return rows_of(head, body, names=1)


def _mean(lines: Sequence[Line], name: str) -> float | None:
    known = [line[name] for line in lines if line.get(name) is not None]
    return math.fsum(known) / len(known) if known else None


def _number(value: float | None, form: str, unit: float = 1) -> str:
    return "" if value is None else format(value / unit, form)


def machines(lines: Sequence[Line]) -> list[str]:
    """Where and with what the results were made, in how many hours."""
    found: dict[tuple[tuple[str, str], ...], list[Line]] = {}
    for line in lines:
        about = tuple((name, str(value)) for name, value in line["machine"].items() if name != "commit")
        found.setdefault(about, []).append(line)
    body = []
    for about, own in found.items():
        versions = ", ".join(f"{name} {value}" for name, value in about if name != "device" and value != "None")
        commits = ", ".join(dict.fromkeys(str(line["machine"].get("commit")) for line in own))
        seeds = ", ".join(map(str, sorted({line["seed"] for line in own})))
        trained = sum(line["kind"] == "training" for line in own)
        body.append(
            [dict(about)["device"], versions, commits, seeds, str(trained), str(len(own) - trained), _hours(own)]
        )
    head = ["device", "versions", "commits", "seeds", "trainings", "evaluations", "hours"]
    return rows_of(head, body, names=4)


def _hours(lines: Sequence[Line]) -> str:
    known = [line["seconds"] for line in lines if line.get("seconds") is not None]
    if not known:
        return ""
    counted = "" if len(known) == len(lines) else f" ({len(known)} of {len(lines)} results say)"
    return f"{math.fsum(known) / 3600:.1f}{counted}"


def _names(cell: Cell) -> list[str]:
    return [cell.row, cell.attention, str(len(cell.lines)), share(cell.kept), share(cell.pairs)]


def rows_of(head: Sequence[str], body: Iterable[Sequence[str]], names: int = 2) -> list[str]:
    """A Markdown table, whose columns after the first ones, of names, are set to the right."""
    rule = "|".join("---" if number < names else "---:" for number in range(len(head)))
    first, *others = (f"| {' | '.join(map(plain, row))} |" for row in (head, *body))
    return [first, f"|{rule}|", *others]


def plain(text: str) -> str:
    """Text as Markdown shows it, within one line: names in results are those of devices, commits, rows and data."""
    escaped = html.escape(text, quote=False).replace("|", "\\|")
    return printable("<br>".join(escaped.split("\n")))


def interval(estimate: Estimate, digits: int, sign: str = "") -> str:
    """``0.412 [0.380, 0.444]``."""
    value, low, high = (f"{number:{sign}.{digits}f}" for number in estimate)
    return f"{value} [{low}, {high}]"


def percent(estimate: Estimate) -> str:
    """``91.2% [88.0%, 94.4%]``; nothing for NaN."""
    if math.isnan(estimate.value):
        return ""
    return f"{estimate.value:.1%} [{estimate.low:.1%}, {estimate.high:.1%}]"


def perplexity(loss: Estimate) -> str:
    """Of a loss in nats for each token."""
    return interval(loss.exp(), 2)


def seeds(count: int) -> str:
    """How many there are, in words."""
    return "1 seed" if count == 1 else f"{count} seeds"


def share(value: float | None) -> str:
    """``25%``, ``12.5%``; nothing for None."""
    return "" if value is None else f"{100 * value:.1f}".removesuffix(".0") + "%"
