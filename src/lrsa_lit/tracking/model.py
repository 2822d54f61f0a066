"""Logging of the trained model to its run, as a folder that transformers can load."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Literal

from lightning.pytorch import Callback, LightningModule, Trainer

from lrsa_lit.errors import UserError
from lrsa_lit.models.adapters import check_holdable
from lrsa_lit.models.checkpoint import load_trained
from lrsa_lit.models.folder import AnotherModel, save_folder
from lrsa_lit.strategies import shards_weights
from lrsa_lit.tasks import LongContextQA
from lrsa_lit.tracking.artifacts import run_folder
from lrsa_lit.tracking.logger import MLflowRun, run_of
from lrsa_lit.tracking.store import reason

FOLDER = "model"
"""The artifact's name in MLflow."""

_log = logging.getLogger("lrsa_lit.tracking")


class LogModel(Callback):
    """Log the best checkpoint's model once, at the end of a fit, as the artifact folder ``model/``.

    The folder is written by :func:`lrsa_lit.models.folder.save_folder`, with all weights or, if adapters were trained,
    the adapters. Without a best checkpoint, it has the model at the end of training. For a store on this machine, the
    folder is written in place; otherwise it is uploaded. No folder is logged if the fit was stopped, if the weights are
    sharded, or for adapters with scaled positions, which a folder of adapters cannot hold. With ``spectra``, it has the
    low-rank model of the best checkpoint.

    Args:
        what: ``all`` logs all trained weights, which take as much space as the model; ``adapters`` logs only adapters;
            ``none`` logs nothing.
    """

    def __init__(self, what: Literal["all", "adapters", "none"] = "all") -> None:
        self.what = what

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write and log the folder; a failure is only logged as a warning."""
        logger = run_of(trainer)
        if logger is None or not isinstance(pl_module, LongContextQA) or shards_weights(trainer.strategy):
            return
        best = getattr(trainer.checkpoint_callback, "best_model_path", "")
        same = pl_module.head_gates is not None or pl_module.digests is not None
        if same or (pl_module.spectra is not None and not best):
            # The model's weights did not change, or no checkpoint gives the low-rank model.
            return
        adapted = pl_module.backbone.lora is not None
        if self.what == "none" or (self.what == "adapters" and not adapted):
            return
        scratch = run_folder(trainer) / FOLDER
        try:
            if adapted:
                check_holdable(pl_module.backbone)
            with logger.answering():
                local = _local_artifacts(logger)
                target = scratch if local is None else local / FOLDER
                trained = load_trained(Path(best)) if best else None
                model, weights = pl_module.model, None if trained is None else trained.weights
                if pl_module.spectra is not None and trained is not None:
                    model, weights = trained.build(), None
                # A resumed run may have logged a folder before.
                save_folder(model, pl_module.tokenizer, target, weights=weights, replace=True)
                if local is None:
                    logger.experiment.log_artifacts(logger.run_id, str(scratch), FOLDER)
                    shutil.rmtree(scratch)
        except AnotherModel as error:
            _log.warning("The model folder was not logged: %s", error)
        except UserError as error:
            kept = f"; it is in {scratch}" if scratch.is_dir() else ""
            _log.warning("The model folder was not logged: %s%s", reason(error.__cause__ or error), kept)


def _local_artifacts(logger: MLflowRun) -> Path | None:
    """The folder of the run's artifacts, if the store is on this machine."""
    from mlflow.utils.file_utils import local_file_uri_to_path

    uri = str(logger.experiment.get_run(logger.run_id).info.artifact_uri)
    return Path(local_file_uri_to_path(uri)) if uri.startswith("file:") else None
