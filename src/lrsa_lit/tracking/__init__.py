"""Runs in MLflow: with each run what is needed to repeat it, to compare it and to take it up again."""

from lrsa_lit.tracking.logger import MLflowRun
from lrsa_lit.tracking.record import RecordConfig, flatten, run_name

__all__ = ["MLflowRun", "RecordConfig", "flatten", "run_name"]
