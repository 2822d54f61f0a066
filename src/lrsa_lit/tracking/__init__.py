"""Tracking of runs in MLflow: everything needed to repeat, compare and resume a run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lrsa_lit.lazy import lazily

if TYPE_CHECKING:
    from lrsa_lit.tracking.logger import MLflowRun
    from lrsa_lit.tracking.model import LogModel
    from lrsa_lit.tracking.performance import SystemMetrics, Throughput
    from lrsa_lit.tracking.run_record import RecordConfig
    from lrsa_lit.tracking.samples import SamplePredictions

__all__ = ["LogModel", "MLflowRun", "RecordConfig", "SamplePredictions", "SystemMetrics", "Throughput"]

# Importing Lightning takes seconds, and commands that only need the store do without it.
__getattr__ = lazily(
    __name__,
    {
        "LogModel": "lrsa_lit.tracking.model",
        "MLflowRun": "lrsa_lit.tracking.logger",
        "RecordConfig": "lrsa_lit.tracking.run_record",
        "SamplePredictions": "lrsa_lit.tracking.samples",
        "SystemMetrics": "lrsa_lit.tracking.performance",
        "Throughput": "lrsa_lit.tracking.performance",
    },
)
