"""The Hugging Face seam: ``enable(model, LRSAConfig(…))`` and the compressed cache for generation."""

from lrsa_lit.attention.cache import LRSACache
from lrsa_lit.attention.decoding import graphed_decoding
from lrsa_lit.attention.interface import LAYOUT, disable, enable, enabled_config, observing, using
from lrsa_lit.attention.layout import packed_layout
from lrsa_lit.attention.prefill import prefill
from lrsa_lit.attention.rules import cache_argument

__all__ = [
    "LAYOUT",
    "LRSACache",
    "cache_argument",
    "disable",
    "enable",
    "enabled_config",
    "graphed_decoding",
    "observing",
    "packed_layout",
    "prefill",
    "using",
]
