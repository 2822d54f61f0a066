"""Callbacks that print and write a run's results, and one that checks monitored metrics."""

from lrsa_lit.callbacks.duration import ValidationDuration
from lrsa_lit.callbacks.end_of_run import (
    ClosingSummary,
    FitSummary,
    ValidationHistory,
    show_answers,
    show_evaluation,
    show_next,
)
from lrsa_lit.callbacks.monitored import MonitoredMetrics
from lrsa_lit.callbacks.recalls import RecallSummary, RecallWriter, show_recalls
from lrsa_lit.callbacks.training_record import TrainingRecord
from lrsa_lit.callbacks.writers import AnswerWriter, PredictionWriter

__all__ = [
    "AnswerWriter",
    "ClosingSummary",
    "FitSummary",
    "MonitoredMetrics",
    "PredictionWriter",
    "RecallSummary",
    "RecallWriter",
    "TrainingRecord",
    "ValidationDuration",
    "ValidationHistory",
    "show_answers",
    "show_evaluation",
    "show_next",
    "show_recalls",
]
