"""Results of a sweep's points: a table for the terminal, and artifacts of the sweep's MLflow run."""

from __future__ import annotations

import csv
import io
import math
import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from lrsa_lit.errors import redacted
from lrsa_lit.experiments.parent_run import logger_of
from lrsa_lit.tracking.markdown import escaped, markdown

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from mlflow.entities import Run

_SCORES = ("val/loss", "val/f1", "val/em")


class Point(NamedTuple):
    """One fit: its values of the grid's settings, the arguments of ``lrsa fit``, and the resolved config."""

    values: dict[str, str]
    arguments: list[str]
    config: dict[str, Any]
    digest: str

    @property
    def kept_share(self) -> float:
        """K/L; NaN if K and L do not decide what is kept."""
        rule = self.config["model"]["lrsa"]
        one_k = rule.get("head_top_k") is None and rule.get("system") is None
        return rule["top_k"] / rule["lag_size"] if one_k else math.nan


class Outcome(NamedTuple):
    """The result of a point: its state, and its run if there is one."""

    point: Point
    state: str
    run: Run | None

    def score(self, metric: str = "val/f1") -> float:
        """A metric of its last validation; NaN without one."""
        return math.nan if self.run is None else float(self.run.data.metrics.get(metric, math.nan))


def tabulated(outcomes: Sequence[Outcome]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of a table: settings, share of kept pairs, scores of the last validation, state and run."""
    keys = list(outcomes[0].point.values)
    last = [key.rpartition(".")[2] for key in keys]
    found = [outcome.run.data.metrics if outcome.run is not None else {} for outcome in outcomes]
    others = sorted({name for metrics in found for name in metrics if name.startswith("val/") and name.endswith("/f1")})
    columns = [*_SCORES, *(name for name in others if name not in _SCORES)]
    # Shorten each setting to the last part of its name if that is unique.
    short = [name if last.count(name) == 1 else key for key, name in zip(keys, last, strict=True)]
    rows = []
    for (point, state, run), metrics in zip(outcomes, found, strict=True):
        shown = [f"{metrics[name]:.3f}" if name in metrics else "-" for name in columns]
        ratio, name = (run.data.params.get("kv_ratio", "-"), run.info.run_name) if run is not None else ("-", "-")
        rows.append([*point.values.values(), ratio, *shown, state, str(name)])
    return [*short, "kv_ratio", *columns, "state", "run"], rows


def show(outcomes: Sequence[Outcome], count: int) -> None:
    """Print the results; ``count`` is the number of all points of the sweep."""
    from rich.table import Table

    from lrsa_lit.terminal import PlainConsole

    if not outcomes:
        return
    finished = sum(outcome.state.startswith("finished") for outcome in outcomes)
    table = Table(title=f"Sweep: {finished} of {count} points finished")
    titles, rows = tabulated(outcomes)
    for title in titles[:-2]:
        table.add_column(title, justify="right")
    table.add_column("state")
    table.add_column("run", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console = PlainConsole()
    console.print(table)
    logger = logger_of(outcomes[0].point.config["trainer"])
    store = ["--store", str(logger.get("tracking_uri"))]
    console.say(f"Compare its runs: {redacted(shlex.join(['lrsa', 'ui', *store]))}")


def best(outcomes: Sequence[Outcome]) -> Outcome | None:
    """The finished point with the highest F1, or without F1 with the lowest loss; None without validations."""
    finished = [outcome for outcome in outcomes if outcome.state.startswith("finished")]
    for metric, sign in (("val/f1", 1), ("val/loss", -1)):
        if scored := [outcome for outcome in finished if not math.isnan(outcome.score(metric))]:
            return max(scored, key=lambda outcome: sign * outcome.score(metric))
    return None


def as_csv(outcomes: Sequence[Outcome]) -> str:
    """The table as CSV, which MLflow's artifact page shows as a table."""
    text = io.StringIO()
    titles, rows = tabulated(outcomes)
    csv.writer(text, lineterminator="\n").writerows([titles, *rows])
    return text.getvalue()


def as_note(outcomes: Sequence[Outcome]) -> str:
    """The best point and the table in Markdown, for the description of the sweep's run in MLflow."""
    titles, rows = tabulated(outcomes)
    lines = [markdown(titles, rows, align="---:")]
    chosen = best(outcomes)
    if chosen is not None and chosen.run is not None:
        settings = ", ".join(f"{key}={value}" for key, value in chosen.point.values.items())
        score = "val/loss" if math.isnan(chosen.score()) else "val/f1"
        page = f"#/experiments/{chosen.run.info.experiment_id}/runs/{chosen.run.info.run_id}"
        named = f"[{escaped(chosen.run.info.run_name)}]({page})"
        lines = [f"Best: {named} ({escaped(settings)}), {score} {chosen.score(score):.3f}", "", *lines]
    return "\n".join(lines)


def f1_against_kept(outcomes: Sequence[Outcome]) -> Figure | None:
    """Plot F1 against K/L, one line per combination of the other settings; None if no point has both."""
    from lrsa_lit.analysis.plots import entitle, legend, subplots

    drawn = [each for each in outcomes if not math.isnan(each.score()) and not math.isnan(each.point.kept_share)]
    if not drawn:
        return None
    lines: dict[str, list[Outcome]] = {}
    for outcome in sorted(drawn, key=lambda each: each.point.kept_share):
        values = {key.rpartition(".")[2]: value for key, value in outcome.point.values.items()}
        values.pop("top_k", None)
        lines.setdefault(" ".join(f"{key}={value}" for key, value in values.items()), []).append(outcome)
    figure, axes = subplots(1, 1, size=(7, 3.6))
    for label, line in lines.items():
        shares = [each.point.kept_share for each in line]
        (own,) = axes.plot(shares, [each.score() for each in line], "o-", label=f"{label} LRSA".strip())
        dense = [each.score("val/dense/f1") for each in line]
        if not all(map(math.isnan, dense)):
            axes.plot(shares, dense, "s:", color=own.get_color(), label=f"{label} dense".strip())
    entitle(axes, "F1 against the kept share", "last validation of each run")
    axes.set(xlabel="kept share of a partition (K/L)", ylabel="F1", ylim=(-0.02, 1.02))
    legend(axes)
    return figure
