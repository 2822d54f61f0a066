"""What the machine does during a fit: processor, memory, network and, with nvidia-ml-py, the GPU."""

from __future__ import annotations

import importlib.util
import logging
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lrsa_lit.errors import UserError
from lrsa_lit.tracking.logger import run_of

_log = logging.getLogger("lrsa_lit.tracking")


class SystemMetrics(Callback):
    """Sample ``system/…`` metrics during a fit, through MLflow's own monitor; a fit shorter than a sample has none.

    Args:
        seconds: between two samples.
    """

    def __init__(self, seconds: float = 10.0) -> None:
        if seconds <= 0:
            raise UserError("seconds", seconds, "a number > 0")
        self.seconds = seconds
        self._monitor: Any = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the monitor's thread."""
        logger = run_of(trainer)
        if logger is None:
            return
        if importlib.util.find_spec("psutil") is None:
            _log.info("No system metrics: psutil is not installed")
            return
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        # It announces its start, its end and a missing GPU.
        logging.getLogger("mlflow.system_metrics").setLevel(logging.ERROR)
        self._monitor = SystemMetricsMonitor(
            logger.run_id, self.seconds, resume_logging=logger.continues, tracking_uri=logger.tracking_uri
        )
        self._monitor.start()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Stop it; Lightning calls this after a fit."""
        monitor, self._monitor = self._monitor, None
        if monitor is not None:
            monitor.finish()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Stop it where the fit ends early."""
        self.teardown(trainer, pl_module, "fit")
