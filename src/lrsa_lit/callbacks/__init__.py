"""What the command line shows and writes: the summary of a fit or an evaluation, and answers as JSON lines."""

from lrsa_lit.callbacks.answers import AnswerWriter, PredictionWriter
from lrsa_lit.callbacks.evaluation import show_evaluation
from lrsa_lit.callbacks.fit_summary import FitSummary

__all__ = ["AnswerWriter", "FitSummary", "PredictionWriter", "show_evaluation"]
