"""LRSA as an attention of Hugging Face models: register it, attach the rule, check that every layer uses it."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import logging
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lrsa_lit.attention import prompt_ends
from lrsa_lit.attention.attached import (
    RULE,
    AttachedRule,
    Enabled,
    Observe,
    arguments_by_name,
    base_of,
    cache_of_call,
    enabled_state,
    given_or_stored,
    tokens_of_call,
    warn_if_trained_otherwise,
)
from lrsa_lit.attention.cache import LRSACache, compressed_cache
from lrsa_lit.attention.config import LRSAConfig
from lrsa_lit.attention.families import attention_modules
from lrsa_lit.attention.latents import LATENTS, attach_latents, with_latents
from lrsa_lit.attention.layout import Layout, positions_from_mask, read_layout, restarting_positions
from lrsa_lit.attention.rotation import layers_of
from lrsa_lit.attention.scored_tokens import SCORES, attach_gate, scored
from lrsa_lit.context_parallel import SharedRows, needs_all_keys
from lrsa_lit.errors import UserError
from lrsa_lit.ops.sparse_attention import (
    HeadRules,
    Impl,
    Rule,
    is_traceable,
    sparse_attention,
    tensor_of_heads,
    tensor_of_rule,
    traced_attention,
)

NAME = "lrsa"
"""The name under which the attention is registered with transformers."""

LAYOUT, CACHE = "lrsa_layout", "lrsa_cache"
"""Keywords that carry each forward's layout and compressed cache down to the attention of every layer."""

_UNSUPPORTED = ("sliding_window", "softcap", "s_aux", "sinks", "position_bias", "indices", "block_indices")
"""Keywords of attention variants other than plain causal attention."""

_log = logging.getLogger(__name__)
Model = TypeVar("Model", bound=nn.Module)


def enable(model: Model, config: LRSAConfig | None = None, *, impl: Impl = "auto") -> Model:
    """Give a causal language model lag-relative sparse attention, in place.

    With right padding, left padding and packing (positions that restart, or ``cu_seq_lens_q``), each sequence gets the
    outputs that it gets alone. The rule is written to ``model.config.lrsa``, and so into the saved ``config.json``. A
    second call replaces the rule.

    Args:
        model: a model whose attention goes through transformers' ``AttentionInterface``. The same model is returned.
        config: the rule; its ``dense_layers`` keep ordinary causal attention (sdpa). None means ``model.config.lrsa``.
        impl: the implementation of the operator.

    Raises:
        UserError: there is no rule, the rule does not fit the model's layers or heads, or the model bypasses the
            interface or has another attention than plain causal (encoders, sliding windows, MLA, …). Problems that
            only show when the model runs are raised by the first forward.
    """
    inner = base_of(model)
    config = given_or_stored(config, inner)
    modules = attention_modules(inner)
    layers = layers_of(inner, config)
    disable(inner)
    # No mask function is registered under this name, so transformers makes no mask; the layout replaces it. With a mask
    # function, transformers would look for packed sequences in the positions and wait for the GPU.
    AttentionInterface.register(NAME, _attention)
    trained_with = getattr(inner.config, "lrsa", None)
    warn_if_trained_otherwise(inner, config)
    state = Enabled(config, impl, inner.config._attn_implementation, modules, trained_with)
    for layer, module in enumerate(modules):
        rule = layers.of(layer)
        place = layers.system_of(layer), layers.place(layer)
        attached = AttachedRule(state, rule, layer, *place, _tensor_of(rule))
        state.handles += attach_gate(module, attached, inner.config)
        state.handles += attach_latents(module, layers.latents[layer] if layers.latents else None, CACHE)
        setattr(module, RULE, attached)
    decoder = inner.base_model
    state.handles += [
        decoder.register_forward_pre_hook(functools.partial(_prepare, state), with_kwargs=True),
        decoder.register_forward_hook(functools.partial(_finish, state, type(inner).__name__), with_kwargs=True),
    ]
    if config.system is not None:
        prompt_ends.watch(inner)
    inner.set_attn_implementation(NAME)
    inner.config.lrsa = config.to_dict()
    return model


def _tensor_of(rule: Rule | HeadRules | None) -> Tensor | None:
    """The rule as a tensor for compiled layers; None if the layer is dense or the rule needs a graph break."""
    if rule is None:
        return None
    return tensor_of_heads(rule) if isinstance(rule, HeadRules) else tensor_of_rule(rule)


def disable(model: PreTrainedModel) -> None:
    """Restore the model's own attention. Does nothing if LRSA is not enabled."""
    model = base_of(model)
    state = enabled_state(model)
    if state is None:
        return
    for handle in state.handles:
        handle.remove()
    for module in state.modules:
        delattr(module, RULE)
    prompt_ends.unwatch(model)
    model.set_attn_implementation(state.implementation)
    if state.trained_with is None:
        del model.config.lrsa
    else:
        model.config.lrsa = state.trained_with


def enabled_config(model: PreTrainedModel) -> LRSAConfig | None:
    """The model's current rule, or None."""
    state = enabled_state(model)
    return None if state is None else state.config


@contextlib.contextmanager
def using(model: PreTrainedModel, config: LRSAConfig | None, *, impl: Impl = "auto") -> Iterator[None]:
    """Run a block with another rule (None: the model's own attention) and always restore the previous state."""
    before = enabled_state(model)
    if (None if before is None else (before.config, before.impl)) == (None if config is None else (config, impl)):
        yield
        return
    try:
        disable(model) if config is None else enable(model, config, impl=impl)
        yield
    finally:
        disable(model) if before is None else enable(model, before.config, impl=before.impl)


@contextlib.contextmanager
def dense_pass(model: PreTrainedModel) -> Iterator[None]:
    """Run a block with every layer dense. This is faster than ``using(model, None)``, which attaches the rule again.

    The block must not switch the rule. Nothing happens if LRSA is not enabled.
    """
    state = enabled_state(base_of(model))
    attached: list[AttachedRule] = [] if state is None else [getattr(module, RULE) for module in state.modules]
    before = [(each.rule, each.rule_tensor, each.system) for each in attached]
    try:
        for each in attached:
            each.rule = each.rule_tensor = each.system = None
        yield
    finally:
        for each, (rule, tensor, system) in zip(attached, before, strict=True):
            each.rule, each.rule_tensor, each.system = rule, tensor, system


@contextlib.contextmanager
def observing(model: PreTrainedModel, observe: Observe) -> Iterator[None]:
    """Call ``observe`` with the queries, keys and values of every layer while a block runs.

    In compiled layers, the observer breaks the graph.

    Args:
        model: a model with LRSA enabled.
        observe: called once per layer and forward with the layer's rule, the call's layout, query (B, Hq, T, D), key
            and value (B, H, T, D). It is called again if gradient checkpointing runs a layer again.

    Raises:
        UserError: LRSA is not enabled, the block switched the rule, or a forward in it used an LRSACache, which does
            not hold all keys.
    """
    inner = base_of(model)
    state = enabled_state(inner)
    if state is None:
        raise UserError("model", reason="LRSA is not enabled on it; call lrsa_lit.attention.enable first")
    before, state.observe = state.observe, observe
    try:
        yield
        if enabled_state(inner) is not state:
            raise UserError("model", reason="its rule was switched while it was observed; switch it around the block")
    finally:
        state.observe = before


def _prepare(
    state: Enabled, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Before the decoder runs, read padding and packing once and pass the layout to every layer."""
    implementation = state.modules[0].config._attn_implementation  # type: ignore[union-attr]
    if implementation != NAME:
        hint = "call lrsa_lit.attention.disable for the model's own attention, or enable again"
        reason = f"its attention was set to {implementation!r} while LRSA is enabled"
        raise UserError("model", reason=reason, hint=hint)
    if LAYOUT in kwargs:
        # Until the first forward has been checked, layers tell calls apart by the identity of the layout.
        return None if state.checked else (args, {**kwargs, LAYOUT: dataclasses.replace(kwargs[LAYOUT])})
    given = arguments_by_name(decoder, args, kwargs)
    tokens = tokens_of_call(given)
    if tokens is None:
        return None
    batch, length = tokens.shape[:2]
    cache = cache_of_call(*given.values())
    compressed = compressed_cache(cache, state.config, len(state.modules))
    system = state.config.system
    if cache is not None and compressed is None and system is not None and not system.trains:
        reason = f"{type(system).__name__} works only with an LRSACache: pass LRSACache.of(model)"
        raise UserError("past_key_values", type(cache).__name__, reason=reason)
    past = 0 if cache is None else int(cache.get_seq_length())
    mask, positions = given.get("attention_mask"), given.get("position_ids")
    of_tokens = mask if isinstance(mask, Tensor) and mask.ndim == 2 else None
    boundaries = given.get("cu_seq_lens_q")
    if boundaries is not None:
        positions = given["position_ids"] = restarting_positions(boundaries, positions, length).to(tokens.device)
    if of_tokens is not None and positions is None:
        given["position_ids"] = positions_from_mask(of_tokens, length)
    if compressed is None:
        return (), {**given, LAYOUT: read_layout(mask, positions, (batch, length), past), CACHE: None}
    if mask is None and positions is None:
        given["position_ids"] = compressed.positions_past_pads(length, tokens.device)
    # The cache took the earlier columns with their own masks; only the new columns are passed.
    layout = read_layout(mask if of_tokens is None else of_tokens[:, past:], positions, (batch, length), 0)
    compressed.begin(layout, batch, state.impl)
    return (), {**given, LAYOUT: layout, CACHE: compressed}


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """The registered attention: takes queries (B, Hq, T, D) and returns (B, T, Hq, D)."""
    attached: AttachedRule | None = getattr(module, RULE, None)
    layout: Layout | None = kwargs.get(LAYOUT)
    if attached is None:
        raise UserError("model", reason="its attention was set to 'lrsa'; call lrsa_lit.attention.enable instead")
    if layout is None:
        raise UserError("model", reason="does not pass keywords to its attention layers; it is not supported")
    if attention_mask is not None:
        raise UserError("attention_mask", reason="4-D masks are not allowed; pass the (B, T) mask of the tokens")
    if dropout := kwargs.get("dropout"):
        raise UserError("attention_dropout", dropout, reason="is not allowed; LRSA supports 0 only")
    if kwargs.get("is_causal") is False:
        raise UserError("is_causal", reason="False is not allowed; LRSA is causal")
    for name in _UNSUPPORTED:
        if kwargs.get(name) is not None:
            raise UserError(name, reason="the model needs it, and LRSA does not support it")
    if key.shape[-1] != value.shape[-1]:
        raise UserError("model", reason=f"has keys of {key.shape[-1]} and values of {value.shape[-1]} channels")
    if not torch.compiler.is_compiling() and not attached.state.checked:
        if attached.layout is layout:
            raise UserError("model", reason=f"layer {attached.layer} attends twice in a call; it is not supported")
        attached.layout = layout
    attached.has_attended = True
    scaling: float | None = kwargs.get("scaling")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if torch.is_autocast_enabled(query.device.type):
        # RoPE leaves queries and keys in float32, but the values already have the autocast dtype.
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    cache: LRSACache | None = kwargs.get(CACHE)
    key = scored(key, query, attached, kwargs.get(SCORES), cached=cache is not None)
    key, value = with_latents(key, value, kwargs.get(LATENTS))
    if not torch.compiler.is_compiling():
        output = _attend(module, layout, cache, query, key, value, scale)
    elif cache is None and _is_traceable(attached, layout, query, key):
        output = _attend_traced(module, layout, query, key, value, scale)
    else:
        output = _attend_untraced(module, layout, cache, query, key, value, scale)
    return output.transpose(1, 2).contiguous(), None


def _attend(
    module: nn.Module, layout: Layout, cache: LRSACache | None, query: Tensor, key: Tensor, value: Tensor, scale: float
) -> Tensor:
    if torch.is_autocast_enabled(query.device.type):
        # Scores and transforms that use float32 on purpose must not be cast down.
        with torch.autocast(query.device.type, enabled=False):
            return _attend(module, layout, cache, query, key, value, scale)
    attached: AttachedRule = getattr(module, RULE)
    if layout.shared is not None:
        return _attend_shared(attached, layout.shared, query, key, value, scale)
    if attached.state.observe is not None:
        if cache is not None:
            raise UserError("past_key_values", reason="an LRSACache cannot be observed; run the whole text without it")
        attached.state.observe(attached, layout, query, key, value)
    if cache is not None:
        output: Tensor = cache.layers[attached.layer].attend(query, key, value, scale)
        return output
    attend: Callable[..., Tensor]
    if attached.system is not None:
        attend = functools.partial(attached.system.attend, scale=scale, place=attached.place)
    elif attached.rule is None:
        attend = functools.partial(_dense, module, scale=scale)
    else:
        attend = functools.partial(sparse_attention, rule=attached.rule, scale=scale, impl=attached.state.impl)
    return layout.apply(attend, query, key, value)


def _attend_shared(
    attached: AttachedRule, shared: SharedRows, query: Tensor, key: Tensor, value: Tensor, scale: float
) -> Tensor:
    """:func:`_attend` if devices share the rows and each holds a part of the tokens."""
    if attached.system is not None:
        raise needs_all_keys(attached.system)
    if attached.state.observe is not None:
        raise UserError("context", reason="rows that devices share cannot be observed")
    return shared.attend(query, key, value, attached.rule, scale=scale, impl=attached.state.impl)


# A graph break in compiled layers: its branches on the rule and the layout would make torch recompile the layer.
_attend_untraced = torch.compiler.disable(_attend)


def _attend_traced(
    module: nn.Module, layout: Layout, query: Tensor, key: Tensor, value: Tensor, scale: float
) -> Tensor:
    """A traceable :func:`_attend` for compiled layers; one graph serves all layers and their rules."""
    attached: AttachedRule = getattr(module, RULE)
    if attached.rule_tensor is None:
        return _dense(module, query, key, value, scale=scale)
    return traced_attention(query, key, value, attached.rule_tensor, cu_seqlens=layout.cu_seqlens, scale=scale)


def _is_traceable(attached: AttachedRule, layout: Layout, query: Tensor, key: Tensor) -> bool:
    """Whether a layer can be compiled without a graph break: no observer, no pads, Triton kernels, the rule a tensor.

    Dense layers break the graph if sequences are packed, because they call sdpa once per sequence.
    """
    if attached.state.observe is not None or layout.real is not None or layout.shared is not None:
        return False
    if query.shape[2] != key.shape[2] or attached.system is not None:
        return False
    if attached.rule is None:
        return layout.cu_seqlens is None
    return attached.rule_tensor is not None and is_traceable(attached.state.impl, query)


def _dense(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *, cu_seqlens: Tensor | None = None, scale: float
) -> Tensor:
    """Ordinary causal attention with transformers' sdpa, one packed sequence at a time."""
    # sdpa whatever the model used before: without a mask, neither "eager" (a function of each model file) nor
    # "flex_attention" is causal.
    own = ALL_ATTENTION_FUNCTIONS["sdpa"]
    outputs, past = [], key.shape[2] - query.shape[2]
    for start, stop in itertools.pairwise([0, query.shape[2]] if cu_seqlens is None else cu_seqlens.tolist()):
        part = query[:, :, start:stop], key[:, :, start : stop + past], value[:, :, start : stop + past]
        mask = None
        if past and stop - start > 1:
            mask = torch.ones(1, 1, stop - start, stop - start + past, dtype=torch.bool, device=query.device).tril(past)
        outputs.append(own(module, *part, mask, scaling=scale, dropout=0.0)[0])
    return torch.cat(outputs, dim=1).transpose(1, 2)


def _finish(
    state: Enabled, name: str, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> None:
    """After the decoder ran, check that every layer called the registered attention and used the cache once."""
    cache = kwargs.get(CACHE)
    if isinstance(cache, LRSACache):
        cache.end()
    if state.checked:
        return
    layers: list[AttachedRule] = [getattr(module, RULE) for module in state.modules]
    if missing := [attached.layer for attached in layers if not attached.has_attended]:
        raise UserError("model", reason=f"layers {missing} of {name} did not call the LRSA attention")
    state.checked = True
    _log.debug("all %d layers of %s run LRSA attention", len(layers), name)
