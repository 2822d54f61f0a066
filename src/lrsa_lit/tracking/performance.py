"""Metrics of a fit's speed, its share of the device's peak arithmetic, and the machine's load."""

from __future__ import annotations

import importlib.util
import logging
import sys
import time
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lrsa_lit.data.collate import ExampleSize
from lrsa_lit.errors import UserError
from lrsa_lit.models.flops import Shape, peak_flops
from lrsa_lit.objectives.work import flops
from lrsa_lit.run_labels import WORKLOAD
from lrsa_lit.strategies import sharing_devices
from lrsa_lit.tasks import LongContextQA
from lrsa_lit.tracking.logger import run_of

_GIB = 2**30
_log = logging.getLogger("lrsa_lit.tracking")


class Throughput(Callback):
    """Log tokens per second, seconds per step, peak memory, padding and MFU as ``perf/…``.

    Values are for one device, over the steps since the last logged one, including waiting for data, excluding
    validation and checkpoints. Tokens do not include padding; of rows that devices share, each device counts its part.
    Peak memory is that of PyTorch's allocator on a GPU, and of the whole process elsewhere. Padding is its share in the
    training batches or, with packing, the unused share of the budget. MFU is the rate of
    :func:`lrsa_lit.objectives.work.flops` divided by the device's 16-bit peak; it is left out if the peak is unknown.
    """

    def __init__(self) -> None:
        self._shape: Shape | None = None
        self._since: float | None = None
        self._restart(0)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read the model's shape; the model is complete by now."""
        if isinstance(pl_module, LongContextQA):
            self._shape = Shape.of(pl_module.model)
        self._restart(trainer.global_step)

    def on_train_batch_start(self, *_: Any) -> None:
        """Start the clock at the beginning and after each pause."""
        if self._since is None:
            self._since = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *_: Any
    ) -> None:
        """Count the batch, and log at the steps at which Lightning logs."""
        if self._shape is None:
            return
        self._sizes += batch["sizes"]
        step = trainer.global_step
        if step > self._first and step % getattr(trainer, "log_every_n_steps", 1) == 0:
            values = self._measured(pl_module, self._shape, step - self._first)
            if (padding := getattr(getattr(trainer, "datamodule", None), "padding", None)) is not None:
                values["perf/padding"] = padding
            pl_module.log_dict(values)
            self._restart(step, time.perf_counter())

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock until the next training batch."""
        self._stop(pl_module.device)

    def _measured(self, module: Any, shape: Shape, steps: int) -> dict[str, float]:
        self._stop(module.device)
        sharing = sharing_devices(module.device_mesh)
        values = {
            "perf/tokens_per_second": sum(sum(size.sequences) for size in self._sizes) / self._seconds / sharing,
            "perf/step_seconds": self._seconds / steps,
        }
        if (memory := _peak_memory(module.device)) is not None:
            values["perf/peak_memory_gib"] = memory / _GIB
        device = torch.cuda.get_device_name(module.device) if module.device.type == "cuda" else ""
        # The arithmetic of digests is not counted, so MFU would be wrong.
        if (peak := peak_flops(device)) is not None and module.digests is None:
            done = flops(module.objective, shape, self._sizes, module.train_config)
            values["perf/mfu"] = done / self._seconds / peak / sharing
        return values

    def _stop(self, device: torch.device) -> None:
        if self._since is None:
            return
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        self._seconds += time.perf_counter() - self._since
        self._since = None

    def _restart(self, step: int, since: float | None = None) -> None:
        self._first, self._seconds, self._since = step, 0.0, since
        self._sizes: list[ExampleSize] = []


def _peak_memory(device: torch.device) -> int | None:
    """Peak memory in bytes; None if the system does not report it."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:
        return None
    # The value is in kibibytes, but in bytes on macOS.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class SystemMetrics(Callback):
    """Log processor, memory, network and GPU load as ``workload/…`` metrics during a fit; GPUs need nvidia-ml-py.

    MLflow's own monitor takes the samples; a fit shorter than the interval has none. They are sent with the run's other
    metrics. The prefix ``workload/`` sorts them after the run's scores, unlike MLflow's own ``system/…``.

    Args:
        seconds: interval between two samples, in seconds.
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

        # Suppress the monitor's messages about its start, its end and a missing GPU.
        logging.getLogger("mlflow.system_metrics").setLevel(logging.ERROR)

        def publish(metrics: dict[str, float]) -> None:
            logger.log_metrics({f"{WORKLOAD}{name}": value for name, value in metrics.items()}, trainer.global_step)

        self._monitor = SystemMetricsMonitor(logger.run_id, self.seconds, tracking_uri=logger.tracking_uri)
        self._monitor.publish_metrics = publish
        self._monitor.start()

    def teardown(self, *_: Any, **__: Any) -> None:
        """Stop the monitor; Lightning calls this after a fit."""
        monitor, self._monitor = self._monitor, None
        if monitor is not None:
            monitor.finish()

    on_exception = teardown
