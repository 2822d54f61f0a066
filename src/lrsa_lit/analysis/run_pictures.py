"""A callback that plots a run's scores under each attention, over the steps of a fit."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from lightning.pytorch import LightningModule, Trainer

from lrsa_lit.callbacks import ValidationHistory
from lrsa_lit.run_labels import SCORES, title_of_own
from lrsa_lit.tasks import LongContextQA
from lrsa_lit.tracking.artifacts import harmless, log_figure, loggers_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_DRAWN = ("f1", "loss")


class RunPictures(ValidationHistory):
    """Log F1 and answer loss under each attention as the plot ``pictures/scores.png`` after each evaluation.

    In a fit, the plot has lines over the validations so far; for a single evaluation, it has bars. If the plot cannot
    be drawn or saved, a warning is logged. Without a logger, nothing is drawn.
    """

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Plot the validations so far."""
        super().on_validation_end(trainer, pl_module)
        if not trainer.sanity_checking:
            self._draw(trainer, pl_module, self.history, "val")

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Plot the test."""
        found = {name: float(value) for name, value in trainer.callback_metrics.items()}
        self._draw(trainer, pl_module, [(trainer.global_step, found)], "test")

    def _draw(
        self, trainer: Trainer, task: LightningModule, history: Sequence[tuple[int, Mapping[str, float]]], split: str
    ) -> None:
        if not trainer.is_global_zero or not loggers_of(trainer) or not isinstance(task, LongContextQA):
            return
        with harmless("the picture of the scores"):
            own = title_of_own(task.lrsa, task.attentions)
            stems = {name or own: f"{split}/{name}/" if name else f"{split}/" for name in task.attentions}
            log_figure(trainer, "scores", scores_figure(history, stems))


def scores_figure(history: Sequence[tuple[int, Mapping[str, float]]], stems: Mapping[str, str]) -> Figure:
    """Plot F1 and loss of each attention: lines over the steps of several evaluations, or bars for a single one.

    Args:
        history: the optimizer step and the metrics of each evaluation.
        stems: the prefix of each attention's metric names, by the attention's label.
    """
    # Importing matplotlib takes a second, which runs without a logger should not pay.
    from matplotlib.ticker import MaxNLocator

    from lrsa_lit.analysis.plots import entitle, legend, subplots

    names = [name for name in _DRAWN if any(stem + name in values for _, values in history for stem in stems.values())]
    over_steps = len({step for step, _ in history}) > 1
    height = 3.4 if over_steps else 1.2 + 0.35 * len(stems)
    figure, (panels,) = subplots(1, max(1, len(names)), size=(10, height), squeeze=False)
    for axes, name in zip(panels, names, strict=False):
        title = SCORES[name] if name == "f1" else f"{SCORES[name]} (nats per token)"
        if over_steps:
            for label, stem in stems.items():
                axes.plot(*zip(*((step, values.get(stem + name, math.nan)) for step, values in history), strict=True),
                          "o-", markersize=3, label=label)  # fmt: skip
            entitle(axes, f"{SCORES[name].capitalize()} at each validation")
            axes.set(xlabel="optimizer step", ylabel=title, **_limits("y", name))
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        else:
            found = [history[-1][1].get(stem + name, math.nan) for stem in stems.values()]
            axes.bar_label(axes.barh(list(stems), found), fmt=" %.3f")
            axes.invert_yaxis()
            axes.grid(False, axis="y")
            entitle(axes, f"{SCORES[name].capitalize()} of each attention")
            axes.set(xlabel=title, **_limits("x", name))
    if over_steps and names:
        legend(panels[-1])
    return figure


def _limits(axis: str, name: str) -> dict[str, tuple[float, float]]:
    """Axis limits: F1 is a share, with room around 0 and 1; a loss has no upper bound."""
    return {f"{axis}lim": (-0.02, 1.02)} if name == "f1" else {}
