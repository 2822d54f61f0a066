"""Base LLMs: where they come from and how they are loaded."""

from lrsa_lit.models.backbone import Backbone, LoRA

__all__ = ["Backbone", "LoRA"]
