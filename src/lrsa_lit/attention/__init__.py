"""The Hugging Face seam: ``enable(model, LRSAConfig(…))`` and the compressed cache for generation."""

from lrsa_lit.attention.cache import LRSACache
from lrsa_lit.attention.decoding import graphed_decoding
from lrsa_lit.attention.interface import disable, enable, enabled_config, observing, using
from lrsa_lit.attention.prefill import prefill

__all__ = ["LRSACache", "disable", "enable", "enabled_config", "graphed_decoding", "observing", "prefill", "using"]
