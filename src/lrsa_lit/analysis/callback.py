"""A callback that records, before and after training, which tokens the layers keep of some validation samples."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lrsa_lit.analysis import metrics, plots
from lrsa_lit.analysis.capture import first_rows, record
from lrsa_lit.analysis.record import SelectionRecord
from lrsa_lit.analysis.runs import SELECTIONS
from lrsa_lit.attention import using
from lrsa_lit.errors import UserError
from lrsa_lit.tracking.artifacts import run_folder, show_figure, upload

if TYPE_CHECKING:
    from lrsa_lit.data.collate import Batch

_log = logging.getLogger(__name__)


class CaptureSelections(Callback):
    """Record the selections of the first validation samples at step 0 and at the end of training.

    Each record is a file such as ``selections/step000000.npz`` in the run's folder, beside its checkpoints, with
    figures. They are also artifacts of the MLflow run; without MLflow, the folder is a new ``fit-1``. The metrics
    ``selection/…`` are the shares of the gold passages' and the answers' tokens that are kept on average and by any
    head, and the values expected by chance. Each record costs one additional forward pass of the samples. With several
    processes, only the first one records its samples.

    Args:
        samples: number of validation samples.
        figures: whether to plot the first sample's positions and the survival by layer.
    """

    def __init__(self, samples: int = 8, figures: bool = True) -> None:
        if samples < 1:
            raise UserError("samples", samples, "an integer >= 1")
        self.samples = samples
        self.figures = figures
        self._batches: list[Batch] = []
        self._recorded: int | None = None

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Collect the samples again: each validation is a new loop over the data."""
        self._batches = []

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, *_: Any, **__: Any
    ) -> None:
        """Keep the first samples."""
        missing = self.samples - sum(len(kept["id"]) for kept in self._batches)
        if missing > 0 and trainer.is_global_zero:
            self._batches.append(first_rows(batch, missing))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record the selections of the weights before training."""
        if trainer.global_step == 0 and not trainer.sanity_checking:
            self._record(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record the selections of the trained weights."""
        self._record(trainer, pl_module)

    def _record(self, trainer: Trainer, pl_module: Any) -> None:
        """Run the samples, save and log; skipped if there are none or this step is recorded already."""
        if not self._batches or self._recorded == trainer.global_step:
            return
        self._recorded = trainer.global_step
        with using(pl_module.model, pl_module.lrsa), trainer.precision_plugin.forward_context():
            found = record(
                pl_module.model,
                self._batches,
                pl_module.tokenizer,
                name=pl_module.backbone.name,
                step=trainer.global_step,
            )
        stem = run_folder(trainer) / SELECTIONS / f"step{found.step:06d}"
        files = [stem.with_suffix(".npz")]
        found.save(files[0])
        if self.figures:
            figures = {"positions": plots.positions(found), "survival": plots.survival_by_layer([found])}
            for name, figure in figures.items():
                files.append(stem.with_name(f"{stem.name}-{name}.png"))
                figure.savefig(files[-1])
                show_figure(trainer, f"{SELECTIONS}/{name}", figure, files[-1])
        _log.info("Selections of %d samples at step %d: %s", len(found.samples), found.step, files[0])
        upload(trainer, files, SELECTIONS)
        for logger in trainer.loggers:
            logger.log_metrics(_shares(found), step=found.step)


def _shares(found: SelectionRecord) -> dict[str, float]:
    """The metrics of a record; evidence without tokens in compressed partitions has no metrics."""
    values: dict[str, float] = {}
    evidence: metrics.Evidence
    for evidence in ("gold", "answer"):
        kept = metrics.survival(found, evidence)
        if kept.tokens:
            values[f"selection/{evidence}_kept"] = kept.mean
            values[f"selection/{evidence}_kept_anywhere"] = kept.anywhere
            values["selection/chance"] = kept.chance
            values["selection/chance_anywhere"] = kept.chance_anywhere
    return values
