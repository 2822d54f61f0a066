"""Replace a model's key and value projections by low-rank factors: compute, install, find and multiply them.

Dimensions: N layers, d width of the hidden states, w width of a layer's keys.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lrsa_lit.attention.low_rank_linear import LowRankLinear
from lrsa_lit.errors import UserError
from lrsa_lit.models.low_rank import OTHERS, LowRank
from lrsa_lit.models.truncation import factors_of, log_condition, progressive_ranks

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PROJECTIONS = ("k_proj", "v_proj")
"""The modules of an attention that compute keys and values."""
_OF_PEFT, _ADAPTED = "base_model.model.", ".base_layer."
_NAME = re.compile(r"^(.+\.(?:k_proj|v_proj))\.(down|up\.\d+)\.(weight|bias)$")

_log = logging.getLogger(__name__)


def projections(model: nn.Module) -> list[nn.Module]:
    """The attention module of each layer, in order; a UserError unless each has a ``k_proj`` and a ``v_proj``."""
    found: list[Any] = [
        module
        for module in model.modules()
        if getattr(module, "layer_idx", None) is not None and hasattr(module, "is_causal")
    ]
    if not found or not all(isinstance(getattr(each, name, None), nn.Module) for each in found for name in PROJECTIONS):
        reason = "has no k_proj and v_proj in each layer"
        raise UserError("low_rank", type(model).__name__, reason=reason, hint=OTHERS)
    return sorted(found, key=lambda module: int(module.layer_idx))


@torch.no_grad()
def factor(model: PreTrainedModel, low_rank: LowRank, moments: Tensor | None = None) -> None:
    """Replace a model's key and value projections by low-rank factors, computed in float64 on the CPU.

    Args:
        model: the model. Factors get its dtype; 4-bit weights are dequantised first.
        low_rank: the ranks and the method.
        moments: (N, d, d), the mean of x^T x over inputs x (1, d) of each layer, for whitening; None does not whiten.

    Raises:
        UserError: as in :meth:`LowRank.check`, or a layer has no readable linear ``k_proj`` and ``v_proj``.
    """
    config = model.config.get_text_config()
    low_rank.check(config)
    layers = {index: layer for index, layer in enumerate(projections(model)) if index not in low_rank.dense_layers}
    if moments is not None:
        needed = (config.num_hidden_layers, config.hidden_size)
        if (has := (moments.shape[0], moments.shape[2])) != needed:
            of = f"holds moments of {has[0]} layers of width {has[1]}; the model has {needed[0]} of width {needed[1]}"
            raise UserError("low_rank.whitening", reason=of, hint="measure this model's with `lrsa input-moments`")
    ranks, blocks = _ranks(list(layers.values()), low_rank, config), low_rank.blocks(config)
    for (index, attention), rank in zip(layers.items(), ranks, strict=True):
        inputs = None if moments is None else moments[index].double().cpu()
        for name in PROJECTIONS:
            old = getattr(attention, name)
            parts = [factors_of(part, rank, inputs) for part in _weight(old).T.chunk(blocks, dim=1)]
            like = torch.empty(0, dtype=model.dtype, device=old.weight.device)
            setattr(attention, name, LowRankLinear.of(parts, old.bias, like))
    width, what = low_rank.width(config), "of each head" if blocks > 1 else "of a layer"
    span = str(ranks[0]) if len(set(ranks)) == 1 else f"{ranks[0]} to {ranks[-1]}"
    _log.info("keys and values %s have rank %s of %d in %d layers", what, span, width, len(ranks))


def _ranks(layers: Sequence[nn.Module], low_rank: LowRank, config: Any) -> list[int]:
    if low_rank.schedule == "uniform":
        return [low_rank.mean_rank(config)] * len(layers)
    width = min(low_rank.width(config), config.hidden_size)
    logs = [sum(log_condition(_weight(getattr(layer, name))) for name in PROJECTIONS) for layer in layers]
    return progressive_ranks(logs, low_rank.total_rank(config), width, low_rank.min_share)


def install(model: PreTrainedModel, factors: Mapping[str, Tensor], *, of_these: bool = False) -> None:
    """Replace a model's projections by existing factors, such as those found by :func:`factors_in`.

    Args:
        model: a model with whole projections.
        factors: the factors, by their names in the model.
        of_these: require that the factors' products equal the model's weights.

    Raises:
        UserError: the model has no such projections, they have another width, or their weights differ.
    """
    modules: dict[str, Any] = dict(model.named_modules())
    for name, weights in _of_layers(factors).items():
        owner, _, last = name.rpartition(".")
        down, ups = weights.get("down.weight"), [weight for each, weight in weights.items() if _is_up(each)]
        widths = None if down is None or not ups else (down.shape[1], sum(len(up) for up in ups))
        old = modules.get(name)
        if widths is None or old is None or widths != (old.in_features, old.out_features):
            raise UserError("low_rank", name, reason="has factors for another model")
        ranks = [weights[each].shape[1] for each in sorted(filter(_is_up, weights), key=_block)]
        like = torch.empty(0, dtype=model.dtype, device=old.weight.device)
        layer = LowRankLinear(widths[0], ranks, widths[1], bias="up.0.bias" in weights, like=like)
        try:
            layer.load_state_dict(weights)
        except RuntimeError:
            raise UserError("low_rank", name, reason="has factors whose shapes do not fit together") from None
        if of_these and not _are_factors_of(old, weights):
            hint = "remove low_rank.safetensors from its folder if the other weights were trained since"
            raise UserError("source", name, reason="is not the product of its low-rank factors", hint=hint)
        setattr(modules[owner], last, layer)


def _of_layers(factors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The weights of each factored layer, by the layer's name and then by the weight's name in it."""
    layers: dict[str, dict[str, Tensor]] = {}
    for name, weight in factors.items():
        if (found := _NAME.match(name)) is None:
            raise UserError("low_rank", name, "the name of a factor of k_proj or v_proj")
        layers.setdefault(found[1], {})[f"{found[2]}.{found[3]}"] = weight
    return layers


@torch.no_grad()
def whole(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Replace factors by their products, in the same dtype: the weights of an equal model without factors."""
    found = {name: weight for name, weight in weights.items() if not is_factor(name)}
    for name, parts in _of_layers(factors_in(weights)).items():
        found[f"{name}.weight"] = _product(parts).to(parts["down.weight"].dtype)
        if biases := [parts[each] for each in sorted(parts, key=_block) if each.endswith(".bias")]:
            found[f"{name}.bias"] = torch.cat(biases)
    return found


def _product(parts: Mapping[str, Tensor]) -> Tensor:
    """The whole weight (w, d) of a layer's factors, float64."""
    ups = [parts[each].double() for each in sorted(filter(_is_up, parts), key=_block)]
    downs = parts["down.weight"].double().split([up.shape[1] for up in ups])
    return torch.cat([up @ down for up, down in zip(ups, downs, strict=True)])


def _are_factors_of(whole: nn.Module, parts: Mapping[str, Tensor]) -> bool:
    """Whether a layer's weight is the product of factors, up to rounding; always true for 4-bit weights."""
    weight: Any = whole.weight
    if getattr(weight, "quant_state", None) is not None:
        return True
    rounding = max(torch.finfo(each.dtype).eps for each in (weight, parts["down.weight"]))
    expected = _product(parts).to(weight.device)
    return bool((weight.double() - expected).norm() <= max(1e-5, rounding) * expected.norm())


def is_factor(name: str) -> bool:
    """Whether a weight of this name, in a model or in a wrapper around it, is a factor of keys or values."""
    return _NAME.match(name.replace(_ADAPTED, ".")) is not None


def factors_in(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The factors among the weights of a model or of peft's wrapper around it, by name in the model."""
    return {
        name.removeprefix(_OF_PEFT).replace(_ADAPTED, "."): weight
        for name, weight in weights.items()
        if is_factor(name)
    }


def _is_up(name: str) -> bool:
    return name.startswith("up.") and name.endswith(".weight")


def _block(name: str) -> int:
    """The index of the block that a weight belongs to, by its name in the layer; -1 for ``down``."""
    return int(name.split(".")[1]) if name.startswith("up.") else -1


def _weight(linear: nn.Module) -> Tensor:
    """The weight (w, d) of a linear layer, dequantised, float64 on the CPU."""
    weight: Any = getattr(linear, "weight", torch.empty(0, dtype=torch.uint8))
    if (state := getattr(weight, "quant_state", None)) is not None:
        from bitsandbytes.functional import dequantize_4bit

        weight = dequantize_4bit(weight.data, state)
    if not isinstance(linear, nn.Linear) or not weight.is_floating_point():
        hint = "use a model with whole projections, in float32, float16, bfloat16 or nf4"
        raise UserError("low_rank", type(linear).__name__, reason="is a layer that cannot be factored", hint=hint)
    whole: Tensor = weight.detach().double().cpu()
    return whole
