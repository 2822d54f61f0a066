"""Base LLMs: where they come from and how they are loaded."""

from lrsa_lit.models.backbone import Backbone, LoRA, uncompiled
from lrsa_lit.models.low_rank import LowRank
from lrsa_lit.models.rope import RopeScaling

__all__ = ["Backbone", "LoRA", "LowRank", "RopeScaling", "uncompiled"]
