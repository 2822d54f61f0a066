"""LRSA as an attention of Hugging Face models: register it, attach the rule, check that every layer obeys it."""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lrsa_lit.attention.cache import LRSACache, compressed_cache
from lrsa_lit.attention.layout import Layout, positions_from_mask, read_layout, restarting_positions, split_boundaries
from lrsa_lit.errors import UserError
from lrsa_lit.ops.sparse_attention import Impl, LRSAConfig, sparse_attention

NAME = "lrsa"
"""Under this name the attention and its mask function are registered with transformers."""

_LAYOUT, _CACHE = "lrsa_layout", "lrsa_cache"
"""Keywords that carry each forward's layout and compressed cache down to the attention of every layer."""

_RULE = "_lrsa_rule"
_UNSUPPORTED = ("sliding_window", "softcap", "s_aux")

_log = logging.getLogger(__name__)
Model = TypeVar("Model", bound=nn.Module)


@dataclass(eq=False)
class _Enabled:
    """What :func:`enable` changed on a model, so that :func:`disable` can put it back."""

    config: LRSAConfig
    impl: Impl
    implementation: str
    modules: list[nn.Module]
    trained_with: dict[str, Any] | None
    handles: list[Any] = field(default_factory=list)
    called: set[int] = field(default_factory=set)
    checked: bool = False


@dataclass(frozen=True, eq=False)
class _Rule:
    """The rule of one attention module; a None config means that the layer stays dense."""

    state: _Enabled
    config: LRSAConfig | None
    layer: int


def enable(model: Model, config: LRSAConfig, *, impl: Impl = "auto") -> Model:
    """Give a causal language model lag-relative sparse attention, in place.

    Right padding, left padding and packing (positions that restart, or ``cu_seq_lens_q``) give each token what its
    sequence gets alone. The rule is written to ``model.config.lrsa``, and so into the saved ``config.json``. Calling it
    again replaces the rule.

    Args:
        model: a model whose attention goes through transformers' ``AttentionInterface``.
        config: the rule; ``dense_layers`` keep ordinary causal attention (sdpa).
        impl: implementation of the operator.

    Returns:
        The model.

    Raises:
        UserError: the model bypasses the interface, needs a sliding window, soft capping or attention sinks of its
            own, or has no such dense layer. What only shows when it runs is raised by the first forward.
    """
    inner = _base(model)
    modules = _attention_modules(inner)
    config.check_layers(len(modules))
    disable(inner)
    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, _no_mask)
    trained_with = getattr(inner.config, "lrsa", None)
    if trained_with not in (None, config.to_dict()):
        _warn_once(f"the weights were trained with {trained_with} and now run with {config.to_dict()}")
    state = _Enabled(config, impl, inner.config._attn_implementation, modules, trained_with)
    for layer, module in enumerate(modules):
        setattr(module, _RULE, _Rule(state, config.for_layer(layer), layer))
    decoder = inner.base_model
    state.handles = [
        decoder.register_forward_pre_hook(functools.partial(_prepare, state), with_kwargs=True),
        decoder.register_forward_hook(lambda *_: _check_calls(state, type(inner).__name__)),
    ]
    inner.set_attn_implementation(NAME)
    inner.config.lrsa = config.to_dict()
    return model


def disable(model: PreTrainedModel) -> None:
    """Put the model's own attention back; does nothing to a model that was not enabled."""
    model = _base(model)
    state = _state(model)
    if state is None:
        return
    for handle in state.handles:
        handle.remove()
    for module in state.modules:
        delattr(module, _RULE)
    model.set_attn_implementation(state.implementation)
    if state.trained_with is None:
        del model.config.lrsa
    else:
        model.config.lrsa = state.trained_with


def enabled_config(model: PreTrainedModel) -> LRSAConfig | None:
    """The rule that the model runs under now, or None."""
    state = _state(model)
    return None if state is None else state.config


@contextlib.contextmanager
def using(model: PreTrainedModel, config: LRSAConfig | None, *, impl: Impl = "auto") -> Iterator[None]:
    """Run a block under another rule (None: dense) and restore the model's own one, whatever happens."""
    before = _state(model)
    if (None if before is None else (before.config, before.impl)) == (None if config is None else (config, impl)):
        yield
        return
    try:
        disable(model) if config is None else enable(model, config, impl=impl)
        yield
    finally:
        disable(model) if before is None else enable(model, before.config, impl=before.impl)


def _attention_modules(model: PreTrainedModel) -> list[nn.Module]:
    """The attention of each layer, in order, if all of them can run LRSA."""
    name = type(model).__name__
    config = model.config.get_text_config()
    modules = sorted(
        (module for module in model.modules() if hasattr(module, "layer_idx") and hasattr(module, "is_causal")),
        key=lambda module: module.layer_idx,
    )
    layers = config.num_hidden_layers
    if not model._can_set_attn_implementation() or [m.layer_idx for m in modules] != list(range(layers)):
        raise UserError(
            f"model: {name} does not route all its {layers} layers through transformers' attention interface"
        )
    types = getattr(config, "layer_types", None) or []
    windowed = any(layer_type != "full_attention" for layer_type in types)
    if not types and getattr(config, "use_sliding_window", True):
        windowed = getattr(config, "sliding_window", None) is not None
    if windowed or any(getattr(module, "sliding_window", None) for module in modules):
        raise UserError(f"model: {name} uses sliding-window or linear layers, which LRSA does not support")
    if getattr(config, "attn_logit_softcapping", None):
        raise UserError(f"model: {name} caps its attention scores (softcap), which LRSA does not support")
    if any(getattr(module, "sinks", None) is not None for module in modules):
        raise UserError(f"model: {name} learns attention sinks (s_aux), which LRSA does not support")
    if getattr(config, "attention_dropout", 0.0):
        raise UserError(f"model: attention_dropout={config.attention_dropout}; LRSA supports 0 only")
    return modules


def _base(model: Any) -> Any:
    """The Hugging Face model inside a peft wrapper; any other model is its own."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _state(model: PreTrainedModel) -> _Enabled | None:
    for module in model.modules():
        rule: _Rule | None = getattr(module, _RULE, None)
        if rule is not None:
            return rule.state
    return None


def _prepare(
    state: _Enabled, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[()], dict[str, Any]]:
    """Before the decoder runs: read padding and packing once, and hand the layout down to every layer."""
    given = _by_name(decoder, args, kwargs)
    tokens = next(given[name] for name in ("input_ids", "inputs_embeds") if given.get(name) is not None)
    batch, length = tokens.shape[:2]
    cache = given.get("past_key_values")
    compressed = compressed_cache(cache, state.config, len(state.modules))
    past = 0 if cache is None else int(cache.get_seq_length())
    mask, positions = given.get("attention_mask"), given.get("position_ids")
    boundaries = given.get("cu_seq_lens_q")
    if boundaries is not None:
        positions = given["position_ids"] = restarting_positions(boundaries, positions, length).to(tokens.device)
    if mask is not None and mask.ndim == 2 and positions is None:
        given["position_ids"] = positions_from_mask(mask, length)
    if compressed is not None and mask is not None and mask.ndim == 2:
        # The cache took in the earlier columns under their own masks; only the new ones are handed over.
        layout = read_layout(mask[:, past:], positions, (batch, length), 0)
    else:
        layout = read_layout(mask, positions, (batch, length), past if compressed is None else 0)
    if compressed is not None:
        compressed.begin(layout, batch)
    return (), {**given, _LAYOUT: layout, _CACHE: compressed}


def _by_name(decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments of a forward call as keywords."""
    signature = inspect.signature(decoder.forward)
    given = dict(signature.bind_partial(*args, **kwargs).arguments)
    extra = [name for name, item in signature.parameters.items() if item.kind is item.VAR_KEYWORD]
    keywords = given.pop(extra[0], {}) if extra else {}
    return {**given, **keywords}


def _no_mask(*args: Any, **kwargs: Any) -> None:
    """The mask function of LRSA: padding and packing travel in the layout instead."""


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The registered attention: (B, Hq, T, D) queries in, (B, T, Hq, D) out."""
    rule: _Rule | None = getattr(module, _RULE, None)
    layout: Layout | None = kwargs.get(_LAYOUT)
    if rule is None:
        raise UserError("model: its attention is set to 'lrsa' but not by lrsa_lit.attention.enable; call that instead")
    if layout is None:
        raise UserError("model: it hands no keywords down to its attention layers; this family is not supported")
    if attention_mask is not None:
        raise UserError("attention_mask: masks prepared in 4-D are not allowed; pass the (B, T) mask of the tokens")
    _refuse(dropout, kwargs)
    rule.state.called.add(rule.layer)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if torch.is_autocast_enabled(query.device.type):
        # RoPE leaves queries and keys in float32, the projection of the values does not.
        query, key, value = (x.to(torch.get_autocast_dtype(query.device.type)) for x in (query, key, value))
    cache: LRSACache | None = kwargs.get(_CACHE)
    if cache is not None:
        output = cache.layers[rule.layer].attend(query, scale)
    else:
        attend = _dense(module, scale) if rule.config is None else _sparse(rule.config, rule.state.impl, scale)
        output = layout.apply(attend, query, key, value)
    return output.transpose(1, 2).contiguous(), None


def _refuse(dropout: float, kwargs: dict[str, Any]) -> None:
    if dropout:
        raise UserError(f"attention_dropout: {dropout} is not allowed; LRSA supports 0 only")
    for name in _UNSUPPORTED:
        if kwargs.get(name) is not None:
            raise UserError(f"{name}: the model needs it, and LRSA does not support it")


def _sparse(config: LRSAConfig, impl: Impl, scale: float) -> Any:
    def attend(query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        return sparse_attention(query, key, value, config, cu_seqlens=cu_seqlens, scale=scale, impl=impl)

    return attend


def _dense(module: nn.Module, scale: float) -> Any:
    """Ordinary causal attention by transformers' sdpa, one packed sequence at a time."""
    # Whatever the model had: "eager" is a function of each model file, and without a mask it is no more causal than
    # "flex_attention".
    own = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def attend(query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        pieces = [(0, query.shape[2])] if cu_seqlens is None else split_boundaries(cu_seqlens)
        outputs = []
        for start, stop in pieces:
            offset = key.shape[2] - query.shape[2]
            part = query[:, :, start:stop], key[:, :, start : stop + offset], value[:, :, start : stop + offset]
            outputs.append(own(module, *part, _causal_mask(*part[:2]), scaling=scale, dropout=0.0)[0])
        return torch.cat(outputs, dim=1).transpose(1, 2)

    return attend


def _causal_mask(query: Tensor, key: Tensor) -> Tensor | None:
    """None (plain causal) where queries and keys are the same tokens, else a bottom-right causal mask (1, 1, N, M)."""
    count, total = query.shape[2], key.shape[2]
    if count in (1, total):
        return None
    return torch.ones(1, 1, count, total, dtype=torch.bool, device=query.device).tril(total - count)


@functools.lru_cache
def _warn_once(message: str) -> None:
    """An evaluation switches back and forth between rules; each is worth one line."""
    _log.warning("%s", message)


def _check_calls(state: _Enabled, name: str) -> None:
    """After the first forward: every layer must have called the registered attention."""
    if state.checked:
        return
    if missing := sorted(set(range(len(state.modules))) - state.called):
        raise UserError(
            f"model: layers {missing} of {name} did not call the LRSA attention; this family is not supported"
        )
    state.checked = True
    _log.debug("all %d layers of %s run LRSA attention", len(state.modules), name)
