"""The Hugging Face seam: ``enable(model, LRSAConfig(…))`` and the compressed cache for generation."""

from lrsa_lit.attention.cache import LRSACache
from lrsa_lit.attention.decoding import Greedy, graphed_decoding, greedy_tokens, prefill, single_token_steps
from lrsa_lit.attention.interface import LAYOUT, disable, enable, enabled_config, observing, using
from lrsa_lit.attention.layout import packed_layout
from lrsa_lit.attention.rules import cache_argument

__all__ = [
    "LAYOUT",
    "Greedy",
    "LRSACache",
    "cache_argument",
    "disable",
    "enable",
    "enabled_config",
    "graphed_decoding",
    "greedy_tokens",
    "observing",
    "packed_layout",
    "prefill",
    "single_token_steps",
    "using",
]
