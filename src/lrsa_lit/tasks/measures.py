"""Set attentions to a budget, and measure their costs."""

from __future__ import annotations

from collections.abc import Mapping

from lrsa_lit.attention import LRSAConfig, at_budget, mean_top_k, shares
from lrsa_lit.errors import UserError
from lrsa_lit.models import Backbone
from lrsa_lit.strategies import gathered
from lrsa_lit.tasks.answer_meter import AnswerMeter

MEASURES = {
    "kept": "kept",
    "cache": "cache, of dense bytes",
    "read": "read, of dense bytes",
    "peak": "peak, of dense bytes",
    "pairs": "pairs, of dense ones",
    "first_token_seconds": "first token, s",
    "token_seconds": "token, s",
}
"""The costs of an attention in an evaluation, with their titles. All but seconds are shares of dense attention's cost
for prompts that no filter has shortened. ``cache`` counts bytes at the end of prompts, ``peak`` the most bytes after
any call of the prefill. ``read`` exists only for systems that look up what to read. Seconds are medians of batches."""


def at_budgets(
    rules: Mapping[str, LRSAConfig | None],
    backbone: Backbone,
    max_tokens: int,
    *,
    share: float | None = None,
    cache_tokens: int | None = None,
) -> dict[str, LRSAConfig | None]:
    """Set all attentions except dense ones to a share of the cache of a prompt of ``max_tokens`` tokens.

    The share may also be given as a number of tokens in a dense cache. Without either, the attentions do not change.

    Raises:
        UserError: both are given, or an attention cannot be set to the share.
    """
    if share is not None and cache_tokens is not None:
        raise UserError("budget, cache_tokens", reason="only one of them is allowed")
    if cache_tokens is not None and cache_tokens < 1:
        raise UserError("cache_tokens", cache_tokens, "an integer >= 1")
    budget = share if cache_tokens is None else min(1.0, cache_tokens / max_tokens)
    if budget is None:
        return dict(rules)
    config = backbone.config.get_text_config()
    of_model = config.num_hidden_layers, backbone.head
    try:
        return {name: rule and at_budget(rule, budget, max_tokens, *of_model) for name, rule in rules.items()}
    except UserError as error:
        if cache_tokens is not None:
            error.field, error.value = "cache_tokens", cache_tokens
            error.allowed = error.allowed and f"a share of {max_tokens} tokens that is {error.allowed}"
        raise


def measured(
    rules: Mapping[str, LRSAConfig | None], meters: Mapping[str, AnswerMeter], layers: int, split: str
) -> dict[str, float]:
    """The :data:`MEASURES` of each attention, by metric name, over all processes; empty without generated answers."""
    processes = gathered({name: meter.usages for name, meter in meters.items()})
    found: dict[str, float] = {}
    for name, rule in rules.items():
        if usages := [usage for process in processes for usage in process[name]]:
            values = shares(usages)
            left = values.pop("left")
            if rule is not None and rule.system is None:
                # K/L, mean over layers and heads; dense ones count as 1. Sinks and windows are additional.
                values["kept"] = left * float(mean_top_k(rule, layers) / rule.lag_size)
            found |= {f"{split}/{name}/{key}" if name else f"{split}/{key}": value for key, value in values.items()}
    return found
