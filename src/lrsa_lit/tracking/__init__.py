"""Runs in MLflow: with each run what is needed to repeat it, to compare it and to take it up again."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lrsa_lit.lazy import lazily

if TYPE_CHECKING:
    from lrsa_lit.tracking.logger import MLflowRun
    from lrsa_lit.tracking.model import LogModel
    from lrsa_lit.tracking.performance import Throughput
    from lrsa_lit.tracking.run_record import RecordConfig, flatten, run_name
    from lrsa_lit.tracking.samples import SamplePredictions
    from lrsa_lit.tracking.system import SystemMetrics

__all__ = [
    "LogModel",
    "MLflowRun",
    "RecordConfig",
    "SamplePredictions",
    "SystemMetrics",
    "Throughput",
    "flatten",
    "run_name",
]

# Lightning takes seconds to import, and the store is asked by commands that do without it.
__getattr__ = lazily(
    __name__,
    {
        "LogModel": "lrsa_lit.tracking.model",
        "MLflowRun": "lrsa_lit.tracking.logger",
        "RecordConfig": "lrsa_lit.tracking.run_record",
        "SamplePredictions": "lrsa_lit.tracking.samples",
        "SystemMetrics": "lrsa_lit.tracking.system",
        "Throughput": "lrsa_lit.tracking.performance",
        "flatten": "lrsa_lit.tracking.run_record",
        "run_name": "lrsa_lit.tracking.run_record",
    },
)
