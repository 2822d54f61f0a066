"""The rotation of a transformers model's keys: read from the model and checked against the model's own function."""

from __future__ import annotations

import dataclasses
import inspect
import sys
from typing import Any

import torch
from torch import nn

from lrsa_lit.attention.attached import base_of
from lrsa_lit.attention.budgets import heads_of
from lrsa_lit.attention.config import LayerRules, LRSAConfig
from lrsa_lit.attention.families import attention_modules
from lrsa_lit.attention.latents import readers_of
from lrsa_lit.errors import UserError
from lrsa_lit.ops.sparse_attention import Rotary

KINDS = ("default", "linear", "llama3", "yarn")
"""Rope types of transformers whose frequencies do not depend on the length."""


def layers_of(model: Any, config: LRSAConfig) -> LayerRules:
    """The rules of a model's layers, with their rotations and readers of latents if these are needed.

    Raises:
        UserError: the model lacks one of the dense layers, has other numbers of layers or heads than the budgets, does
            not fit the system, has no supported rotation, or has no latents.
    """
    inner, layers = base_of(model), config.layers
    count, heads = len(attention_modules(inner)), heads_of(inner.config)
    layers.check(count, heads)
    if config.needs_rotary:
        layers = dataclasses.replace(layers, rotaries=rotaries_of(model))
    if config.latents:
        shared = getattr(config.compressor, "shared_heads", False) or config.top_k in (0, config.lag_size)
        readers = readers_of(attention_modules(inner), rotaries_of(model), heads, shared=shared)
        layers = dataclasses.replace(layers, latents=readers)
    return layers


def rotaries_of(model: Any) -> tuple[Rotary, ...]:
    """The rotation of each layer of a causal language model; it has no frequencies if a layer has no positions.

    Raises:
        UserError: the model has no rotary positions or several kinds of them, they depend on the length (dynamic,
            longrope), they rotate other pairs of channels than i and i + n, or the model has no weights yet.
    """
    inner = base_of(model)
    name, layers = type(inner).__name__, attention_modules(inner)
    found = [module for module in inner.modules() if isinstance(getattr(module, "rope_type", None), str)]
    if len(found) != 1:
        raise _refusal(name, "has no rotary positions, or several kinds of them")
    (module,) = found
    if module.rope_type not in KINDS:
        raise UserError("rope_type", module.rope_type, f"one of {', '.join(KINDS)}", reason="depends on the length")
    if module.inv_freq.is_meta:
        raise _refusal(name, "has no weights yet")
    rotary = Rotary(tuple(module.inv_freq.float().tolist()), float(module.attention_scaling))
    if not _rotates(rotary, module, layers[0]):
        raise _refusal(name, "rotates other pairs of channels than i and i + n")
    return tuple(rotary if getattr(layer, "use_rope", True) else Rotary(()) for layer in layers)


def _rotates(rotary: Rotary, module: nn.Module, attention: nn.Module) -> bool:
    """Whether the model's own rotation function gives the same result on a few numbers."""
    apply = getattr(sys.modules[type(attention).__module__], "apply_rotary_pos_emb", None)
    if apply is None or list(inspect.signature(apply).parameters)[:4] != ["q", "k", "cos", "sin"]:
        return False
    positions = torch.tensor([0, 1, 5], device=module.inv_freq.device)  # type: ignore[arg-type]
    x = torch.linspace(-1, 1, 6 * len(rotary.frequencies), device=positions.device).view(1, 1, 3, -1)
    with torch.no_grad(), torch.autocast(positions.device.type, enabled=False):
        rotated = apply(x, x, *module(x, positions[None]))[1]
    return torch.allclose(rotated, rotary.rotate(x, positions), atol=1e-4)


def _refusal(name: str, reason: str) -> UserError:
    return UserError("model", name, reason=f"{reason}; the rotation of its keys cannot be removed")
