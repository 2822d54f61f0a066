"""Reliable checkpoints, and training that resumes from them as if it had never stopped."""

from lrsa_lit.checkpoints.checkpoint_io import AtomicCheckpointIO
from lrsa_lit.checkpoints.exact_state import ExactState
from lrsa_lit.checkpoints.finite import FiniteLoss
from lrsa_lit.checkpoints.form import CheckedForm
from lrsa_lit.checkpoints.safe_model_checkpoint import SafeModelCheckpoint
from lrsa_lit.checkpoints.stop import GracefulStop

__all__ = [
    "AtomicCheckpointIO",
    "CheckedForm",
    "ExactState",
    "FiniteLoss",
    "GracefulStop",
    "SafeModelCheckpoint",
]
