"""LRSA in Hugging Face models: ``enable(model, LRSAConfig(…))``, the compressed cache and generation."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lrsa_lit.lazy import lazily

if TYPE_CHECKING:
    from lrsa_lit.attention.attached import AttachedRule, base_of, cache_argument
    from lrsa_lit.attention.budgets import mean_top_k
    from lrsa_lit.attention.cache import LRSACache
    from lrsa_lit.attention.cache_budget import at_budget, cache_share, head_of
    from lrsa_lit.attention.config import LayerRules, LRSAConfig
    from lrsa_lit.attention.decoding import (
        Greedy,
        end_prompt,
        generate_under_rule,
        graphed_decoding,
        greedy_tokens,
        prefill,
        read_prompts,
        single_token_steps,
    )
    from lrsa_lit.attention.interface import (
        LAYOUT,
        dense_pass,
        disable,
        enable,
        enabled_config,
        observing,
        using,
    )
    from lrsa_lit.attention.layout import Layout, packed_layout
    from lrsa_lit.attention.measured import Measured, Usage, shares
    from lrsa_lit.attention.rotation import rotaries_of

__all__ = [
    "LAYOUT", "AttachedRule", "Greedy", "LRSACache", "LRSAConfig", "LayerRules", "Layout", "Measured", "Usage",
    "at_budget", "base_of", "cache_argument", "cache_share", "dense_pass", "disable", "enable", "enabled_config",
    "end_prompt", "generate_under_rule", "graphed_decoding", "greedy_tokens", "head_of", "mean_top_k", "observing",
    "packed_layout", "prefill", "read_prompts", "rotaries_of", "shares", "single_token_steps", "using",
]  # fmt: skip

_NAMES = {
    "attached": ("AttachedRule", "base_of", "cache_argument"),
    "budgets": ("mean_top_k",),
    "cache_budget": ("at_budget", "cache_share", "head_of"),
    "cache": ("LRSACache",),
    "config": ("LRSAConfig", "LayerRules"),
    "decoding": (
        "Greedy",
        "end_prompt",
        "generate_under_rule",
        "graphed_decoding",
        "greedy_tokens",
        "prefill",
        "read_prompts",
        "single_token_steps",
    ),
    "interface": ("LAYOUT", "dense_pass", "disable", "enable", "enabled_config", "observing", "using"),
    "layout": ("Layout", "packed_layout"),
    "measured": ("Measured", "Usage", "shares"),
    "rotation": ("rotaries_of",),
}
# Importing transformers takes seconds, and checking a config does without it.
__getattr__ = lazily(__name__, {name: f"{__name__}.{module}" for module, names in _NAMES.items() for name in names})
