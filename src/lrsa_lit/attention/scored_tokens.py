"""Scores of tokens, from gates on the hidden states that each layer's attention receives.

Dimensions: B batch, H key-value heads, T tokens, D head_dim.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lrsa_lit.attention.attached import RULE, AttachedRule
from lrsa_lit.attention.budgets import heads_of
from lrsa_lit.attention.module_calls import hidden_states
from lrsa_lit.errors import UserError
from lrsa_lit.ops.sparse_attention import HeadRules, TokenGate, with_scores

SCORES = "lrsa_token_scores"
"""The keyword that carries the scores (B, H, T) from a hook before an attention module to the attention itself."""


def attach_gate(module: nn.Module, attached: AttachedRule, config: Any) -> list[Any]:
    """Score the tokens before a layer attends, if its compressor needs scores; returns the handles of the hook.

    Args:
        module: the layer's attention.
        attached: the rule that is attached to it.
        config: the model's config.

    Raises:
        UserError: the gates were made for another model.
    """
    rule = attached.rule.common if isinstance(attached.rule, HeadRules) else attached.rule
    if rule is None or not isinstance(rule.compressor, TokenGate):
        return []
    text = config.get_text_config()
    attached.gate = rule.compressor.gate(attached.layer, text.num_hidden_layers, heads_of(config), text.hidden_size)
    return [module.register_forward_pre_hook(_score, with_kwargs=True)]


def scored(key: Tensor, query: Tensor, attached: AttachedRule, scores: Tensor | None, cached: bool) -> Tensor:
    """Keys (B, H, T, D) of a layer, with the scores of their tokens if its rule takes scores.

    Raises:
        UserError: some keys are from earlier calls, whose scores an uncompressed cache does not hold; or the model
            passes no scores to its attention.
    """
    if attached.gate is None or attached.rule is None:
        return key
    if key.shape[2] != query.shape[2] and not cached:
        reason = "an uncompressed cache does not hold the token scores that the rule's TokenGate needs"
        raise UserError("past_key_values", reason=reason, hint="use an LRSACache")
    if scores is None:
        raise UserError("model", reason="does not pass keywords to its attention layers; it is not supported")
    return with_scores(key, scores)


def gate_scores(hidden: Tensor, gate: Tensor) -> Tensor:
    """Scores (B, H, T) of hidden states (B, T, width) with weights (H, width), in at least float32 even in autocast."""
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    with torch.autocast(hidden.device.type, enabled=False):
        return (hidden.to(dtype) @ gate.to(dtype).mT).transpose(1, 2)


@torch.no_grad()
def _score(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    attached: AttachedRule = getattr(module, RULE)
    hidden, gate = hidden_states(args, kwargs), attached.gate
    assert gate is not None
    if gate.device != hidden.device:
        gate = attached.gate = gate.to(hidden.device)
    return args, {**kwargs, SCORES: gate_scores(hidden, gate)}
