"""Add biases of keys and values to a model without biases, in a form that transformers loads."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def with_place_for_biases(model: Any, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Make sure that the model's config supports each bias in ``weights``; returns the weights to write.

    Model families have biases in all of an attention's projections or, with ``attention_bias: false``, in none.
    Deviations of spectra are biases of keys and values only, so ``attention_bias`` is enabled in the config and the
    other projections get zero biases.

    Args:
        model: a ``PreTrainedModel`` whose config is about to be written.
        weights: the weights about to be written, by name.

    Raises:
        ValueError: the model family does not support such biases.
    """
    names = _names(model, model.config)
    homeless = [name for name in weights if name.endswith("_proj.bias") and name not in names]
    if not homeless:
        return dict(weights)
    changed = copy.deepcopy(model.config)
    changed.get_text_config().attention_bias = True
    wider = _names(model, changed)
    if missing := [name for name in homeless if name not in wider]:
        raise ValueError(f"{type(model).__name__} does not support {missing[0]}; train with deviation_rate: 0")
    model.config.get_text_config().attention_bias = True
    like = weights[homeless[0]]
    zeros = {name: like.new_zeros(shape) for name, shape in wider.items() if name not in {*names, *homeless}}
    return {**weights, **zeros}


def _names(model: Any, config: Any) -> dict[str, torch.Size]:
    """The shapes of the weights, by name, of a model of the same class with this config."""
    with torch.device("meta"):
        return {name: weight.shape for name, weight in type(model)(copy.deepcopy(config)).state_dict().items()}
