"""Supported models: every layer must be plain causal attention that goes through transformers' interface."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from lrsa_lit.errors import UserError


def attention_modules(model: PreTrainedModel) -> list[nn.Module]:
    """The attention module of each layer, in order.

    Raises:
        UserError: a layer is not plain causal, or bypasses transformers' attention interface.
    """
    name = type(model).__name__
    config = model.config.get_text_config()
    modules = sorted(
        (m for m in model.modules() if getattr(m, "layer_idx", None) is not None and hasattr(m, "is_causal")),
        key=lambda module: module.layer_idx,
    )
    _refuse(name, config, modules)
    layers = config.num_hidden_layers
    if not model._can_set_attn_implementation() or [m.layer_idx for m in modules] != list(range(layers)):
        reason = f"does not route all its {layers} layers through transformers' attention interface"
        raise UserError("model", name, reason=reason)
    if getattr(config, "attention_dropout", 0.0):
        raise UserError("model", reason=f"attention_dropout={config.attention_dropout}; LRSA supports 0 only")
    return modules


def check_config(config: Any) -> None:
    """Refuse an unsupported model by the config of its text model alone, before its weights are read."""
    _refuse((_of(config, "architectures") or [config.model_type])[0], config, [])


def _refuse(name: str, config: Any, modules: list[nn.Module]) -> None:
    if reason := next(_obstacles(config, modules), None):
        raise UserError("model", name, reason=f"{reason}, which LRSA does not support")


def _obstacles(config: Any, modules: list[nn.Module]) -> Iterator[str]:
    """Features of the model for which the rule is not defined."""
    crossing = ("is_encoder_decoder", "add_cross_attention", "cross_attention_layers")
    if any(_of(config, name) for name in crossing):
        yield "attends from one text to another (cross-attention)"
    if not getattr(config, "is_causal", True) or not all(module.is_causal for module in modules):
        yield "attends in both directions, as encoders do"
    sizes = [{_of(module, "head_dim"), _of(module, "v_head_dim")} - {None} for module in modules]
    if any(_of(module, "kv_lora_rank") for module in modules) or any(len(different) > 1 for different in sizes):
        yield "has keys and values of different sizes, or stores them compressed (MLA)"
    types = _of(config, "layer_types") or []
    windowed = any(layer_type != "full_attention" for layer_type in types)
    if not types and getattr(config, "use_sliding_window", True):
        windowed = _of(config, "sliding_window") is not None
    if windowed or any(_of(module, "sliding_window") for module in modules):
        yield "uses sliding-window or linear layers"
    if _of(config, "attn_logit_softcapping"):
        yield "caps its attention scores (softcap)"
    if any(_of(module, "sinks") is not None for module in modules):
        yield "learns attention sinks (s_aux)"


def _of(owner: Any, name: str) -> Any:
    return getattr(owner, name, None)
