"""What came of a sweep, as a table: a row for each point, with its last validation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from lrsa_lit.experiments.settings_grid import Point

if TYPE_CHECKING:
    from mlflow.entities import Run
    from rich.table import Table

_OWN = ("val/loss", "val/f1", "val/em")


class Outcome(NamedTuple):
    """What came of a point: a word for it, and its run if there is one."""

    point: Point
    state: str
    run: Run | None
    failed: bool = False


def show(outcomes: Sequence[Outcome], points: int) -> None:
    """Print the table."""
    from lrsa_lit.terminal import PlainConsole

    console = PlainConsole()
    if not console.is_terminal:
        # A file has no width that columns must fit in.
        console = PlainConsole(width=200)
    if outcomes:
        console.print(summary(outcomes, points))


def summary(outcomes: Sequence[Outcome], points: int) -> Table:
    """The table: settings, share of kept pairs, what the last validation found under each attention, and the run."""
    from rich.table import Table

    keys = list(outcomes[0].point.values)
    found = [outcome.run.data.metrics if outcome.run is not None else {} for outcome in outcomes]
    others = sorted({name for metrics in found for name in metrics if name.startswith("val/") and name.endswith("/f1")})
    columns = [*_OWN, *(name for name in others if name not in _OWN)]
    finished = sum(not outcome.failed for outcome in outcomes)
    table = Table(title=f"Sweep: {finished} of {points} points finished")
    for title in (*map(_short(keys).get, keys), "kv_ratio", *columns):
        table.add_column(title, justify="right")
    table.add_column("state")
    table.add_column("run", no_wrap=True)
    for outcome, metrics in zip(outcomes, found, strict=True):
        params = outcome.run.data.params if outcome.run is not None else {}
        shown = [f"{metrics[name]:.3f}" if name in metrics else "-" for name in columns]
        name = outcome.run.info.run_name if outcome.run is not None else "-"
        table.add_row(*outcome.point.values.values(), params.get("kv_ratio", "-"), *shown, outcome.state, name)
    return table


def _short(keys: Sequence[str]) -> dict[str, str]:
    """The last part of each setting's name, where that tells it from the others."""
    last = [key.rpartition(".")[2] for key in keys]
    return {key: name if last.count(name) == 1 else key for key, name in zip(keys, last, strict=True)}
