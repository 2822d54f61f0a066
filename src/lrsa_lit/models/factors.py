"""Factors of low rank in the place of a model's projections of keys and values: made, taken from files, and found.

Dimensions: N layers, d width of the hidden states, w width of a matrix that is factored, r its rank.
"""

from __future__ import annotations

import itertools
import logging
import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lrsa_lit.attention.low_rank_linear import Factors, LowRankLinear
from lrsa_lit.errors import UserError
from lrsa_lit.models.low_rank import OTHERS, LowRank

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PROJECTIONS = ("k_proj", "v_proj")
"""The layers of an attention that make keys and values."""
RIDGE = 1e-6
"""What is added to the diagonal of the moments, as a share of its mean: inputs may not span all directions."""
_ZERO = 1e-6
"""Singular values below this share of the largest do not count in a condition number."""
_OF_PEFT, _ADAPTED = "base_model.model.", ".base_layer."
_NAME = re.compile(r"^(.+\.(?:k_proj|v_proj))\.(down|up\.\d+)\.(weight|bias)$")

_log = logging.getLogger(__name__)


def projections(model: nn.Module) -> list[nn.Module]:
    """The attention of each layer, in order; a UserError unless each makes keys and values by layers of their own."""
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
    """Put factors in the place of a model's projections of keys and values, in float64 on the CPU.

    Args:
        model: whose dtype the factors have; weights of 4 bits are read as the numbers that they stand for.
        low_rank: what is wanted.
        moments: (N, d, d), the mean of x^T x over inputs x (1, d) of each layer, to whiten with; None does not whiten.

    Raises:
        UserError: as of :meth:`LowRank.check`, or the layers have no linear ``k_proj`` and ``v_proj`` that can be read.
    """
    config = model.config.get_text_config()
    low_rank.check(config)
    layers = {index: layer for index, layer in enumerate(projections(model)) if index not in low_rank.dense_layers}
    if moments is not None:
        needed = (config.num_hidden_layers, config.hidden_size)
        if (has := (moments.shape[0], moments.shape[2])) != needed:
            of = f"holds moments of {has[0]} layers of width {has[1]}; the model has {needed[0]} of width {needed[1]}"
            raise UserError("low_rank.whitening", reason=of, hint="`lrsa input-moments` measures those of a model")
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
    mean = low_rank.mean_rank(config)
    if low_rank.schedule == "uniform":
        return [mean] * len(layers)
    width = min(low_rank.width(config), config.hidden_size)
    total = mean * len(layers)
    if low_rank.ratio is not None:
        total = max(math.floor(low_rank.ratio * len(layers) * width + 0.5), len(layers))
    logs = [sum(log_condition(_weight(getattr(layer, name))) for name in PROJECTIONS) for layer in layers]
    return progressive_ranks(logs, total, width, low_rank.min_share)


def factors_of(weight: Tensor, rank: int, moments: Tensor | None = None, ridge: float = RIDGE) -> Factors:
    """The best A (d, r) and B (r, w) for a matrix W (d, w): of the outputs x W where the inputs' moments are given.

    Without moments, U S V^T = W, A = U_r and B = S_r V_r^T. With moments C + ridge tr(C) / d = R R^T it is the
    decomposition of R^T W, and A = R^-T U_r (arXiv 2403.07378). The largest entry of each column of A is positive.

    Args:
        weight: (d, w) float64.
        rank: at most min(d, w).
        moments: (d, d) float64, the mean of x^T x over inputs x (1, d).
        ridge: share of the moments' mean diagonal.
    """
    root = None
    if moments is not None:
        small = ridge * moments.diagonal().mean().clamp(min=1e-30)
        root = torch.linalg.cholesky(moments + small * torch.eye(len(moments), dtype=moments.dtype, device="cpu"))
    left, sizes, right = torch.linalg.svd(weight if root is None else root.T @ weight, full_matrices=False)
    left, right = left[:, :rank], sizes[:rank, None] * right[:rank]
    if root is not None:
        left = torch.linalg.solve_triangular(root.T, left, upper=True)
    signs = left.gather(0, left.abs().argmax(dim=0, keepdim=True)).sign()
    return left * signs, right * signs.T


def log_condition(weight: Tensor) -> float:
    """Logarithm of a matrix's condition number, over the singular values that are not zero."""
    sizes = torch.linalg.svdvals(weight.double())
    kept = sizes[sizes > _ZERO * sizes[0]]
    return float((kept[0] / kept[-1]).log()) if len(kept) else 0.0


def progressive(log_conditions: Sequence[float], d_max: float, d_min: float) -> list[float]:
    """LoRC's rank of each layer, before rounding: from d_max in the first to d_min in the last.

    Each falls with the logarithm of the product of its own and all deeper condition numbers. The product itself would
    leave float64 in a large model.

    Args:
        log_conditions: of each layer, that of W_k plus that of W_v.
        d_max: of the first layer.
        d_min: of the last layer.
    """
    sums = list(itertools.accumulate(reversed(log_conditions)))[::-1]
    span = max(sums) - min(sums)
    if span == 0:
        return [d_max] * len(sums)
    return [d_max * (1 - (max(sums) - each) / span * (1 - d_min / d_max)) for each in sums]


def progressive_ranks(log_conditions: Sequence[float], total: int, width: int, min_share: float) -> list[int]:
    """Ranks from 1 to ``width`` that fall as :func:`progressive` has it and sum to ``total``.

    The first layer's is found by bisection, the last is ``min_share`` of it, and what rounding leaves over is taken
    from, or given to, the deepest layers that have room. Where the first would exceed the width, deeper ones get more.
    """

    def ranks(d_max: float) -> list[int]:
        return [rounded(each, width) for each in progressive(log_conditions, d_max, min_share * d_max)]

    low, high = 0.0, width / min_share
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(ranks(middle)) < total else (low, middle)
    found = ranks(high)
    while (left := total - sum(found)) != 0:
        step = 1 if left > 0 else -1
        for layer in reversed(range(len(found))):
            if left and 1 <= found[layer] + step <= width:
                found[layer], left = found[layer] + step, left - step
    return found


def rounded(rank: float, width: int) -> int:
    """The nearest whole rank, halves upwards, from 1 to ``width``."""
    return min(max(math.floor(rank + 0.5), 1), width)


def install(model: PreTrainedModel, factors: Mapping[str, Tensor]) -> None:
    """Put the factors that :func:`factors_in` has found in the place of a model's projections.

    Raises:
        UserError: the model has no such projections, or of another width.
    """
    layers: dict[str, dict[str, Tensor]] = {}
    for name, weight in factors.items():
        if (found := _NAME.match(name)) is None:
            raise UserError("low_rank", name, "the name of a factor of k_proj or v_proj")
        layers.setdefault(found[1], {})[f"{found[2]}.{found[3]}"] = weight
    modules: dict[str, Any] = dict(model.named_modules())
    for name, weights in layers.items():
        owner, _, last = name.rpartition(".")
        down, ups = weights.get("down.weight"), [weight for each, weight in weights.items() if _is_up(each)]
        widths = None if down is None or not ups else (down.shape[1], sum(len(up) for up in ups))
        old = modules.get(name)
        if widths is None or old is None or widths != (old.in_features, old.out_features):
            raise UserError("low_rank", name, reason="has factors of another model")
        ranks = [weights[each].shape[1] for each in sorted(filter(_is_up, weights), key=_block)]
        like = torch.empty(0, dtype=model.dtype, device=old.weight.device)
        layer = LowRankLinear(widths[0], ranks, widths[1], bias="up.0.bias" in weights, like=like)
        try:
            layer.load_state_dict(weights)
        except RuntimeError:
            raise UserError("low_rank", name, reason="has factors that do not fit each other") from None
        setattr(modules[owner], last, layer)


def is_factor(name: str) -> bool:
    """Whether a weight of that name, in a model or in what is around it, is one of a factor of keys or values."""
    return _NAME.match(name.replace(_ADAPTED, ".")) is not None


def factors_in(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The factors among the weights of a model or of peft's wrapper around it, by their names in the model."""
    return {
        name.removeprefix(_OF_PEFT).replace(_ADAPTED, "."): weight
        for name, weight in weights.items()
        if is_factor(name)
    }


def _is_up(name: str) -> bool:
    return name.startswith("up.") and name.endswith(".weight")


def _block(name: str) -> int:
    return int(name.split(".")[1])


def _weight(linear: nn.Module) -> Tensor:
    """The weight (w, d) of a linear layer, whole, float64 on the CPU."""
    weight: Any = linear.weight
    if (state := getattr(weight, "quant_state", None)) is not None:
        from bitsandbytes.functional import dequantize_4bit

        weight = dequantize_4bit(weight.data, state)
    if not isinstance(linear, nn.Linear) or not weight.is_floating_point():
        hint = "take its weights in float32, float16, bfloat16 or nf4"
        raise UserError("low_rank", type(linear).__name__, reason="is no layer that can be factored", hint=hint)
    whole: Tensor = weight.detach().double().cpu()
    return whole
