"""Training objectives: losses that settings name by class path."""

from lrsa_lit.objectives.answer_loss import AnswerLoss
from lrsa_lit.objectives.distillation import Distillation
from lrsa_lit.objectives.hidden_alignment import HiddenAlignment
from lrsa_lit.objectives.language_model_loss import LanguageModelLoss
from lrsa_lit.objectives.objective import Objective, Pass, Term
from lrsa_lit.objectives.odds_ratio import OddsRatio
from lrsa_lit.objectives.student import summed_losses
from lrsa_lit.objectives.sum import Sum

__all__ = [
    "AnswerLoss",
    "Distillation",
    "HiddenAlignment",
    "LanguageModelLoss",
    "Objective",
    "OddsRatio",
    "Pass",
    "Sum",
    "Term",
    "summed_losses",
]
