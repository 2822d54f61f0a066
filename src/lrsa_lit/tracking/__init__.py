"""Runs in MLflow: with each run what is needed to repeat it, to compare it and to take it up again."""

from lrsa_lit.tracking.logger import MLflowRun
from lrsa_lit.tracking.model import LogModel
from lrsa_lit.tracking.performance import Throughput
from lrsa_lit.tracking.record import RecordConfig, flatten, run_name
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
