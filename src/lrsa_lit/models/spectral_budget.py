"""How many components the spectra of keys and values may keep, and their conversion to low-rank factors.

Dimensions: G separately decomposed blocks of a layer, R components of a block.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor, nn

from lrsa_lit.attention.low_rank_linear import LowRankLinear
from lrsa_lit.bounds import check_setting
from lrsa_lit.errors import UserError
from lrsa_lit.models.factors import PROJECTIONS, projections
from lrsa_lit.models.low_rank import LowRank
from lrsa_lit.models.spectrum import SpectrumLinear, pruned, scores_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_LAYER = re.compile(r"\.(\d+)\.")
_LOGITS = ".logits"
_PARTS = ("left", "sigma", "right", "logits", "deviation")


@dataclass(frozen=True)
class SpectralBudget:
    """Which components of the spectra of key and value projections may be kept.

    Args:
        ratio: kept components of all layers together, as a share of the width of their keys and values, in (0, 1].
        threshold: only components with a score above it are kept.
        grouping: "joint" decomposes a layer's whole matrix, "head" each key-value head's matrix separately.
        dense_layers: layers without a spectrum.
    """

    ratio: float
    threshold: float = 0.5
    grouping: Literal["joint", "head"] = "joint"
    dense_layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        check_setting("ratio", self.ratio, 0.0 < self.ratio <= 1.0, "above 0 and at most 1")
        check_setting("threshold", self.threshold, 0.0 <= self.threshold < 1.0, "from 0 to below 1, the initial score")
        check_setting("grouping", self.grouping, self.grouping in ("joint", "head"), "joint or head")
        object.__setattr__(self, "dense_layers", tuple(sorted(set(self.dense_layers))))

    @property
    def low_rank(self) -> LowRank:
        """The low-rank form of the model after training."""
        return LowRank(self.ratio, grouping=self.grouping, dense_layers=self.dense_layers)

    def check(self, config: Any) -> None:
        """Refuse a model by the config of its text model.

        Raises:
            UserError: the model shares keys and values between layers or stores them compressed (the error's field is
                "spectra"), lacks one of the dense layers, or the ratio leaves blocks without a component.
        """
        with _said_of_spectra():
            self.low_rank.check(config)
        width = self.low_rank.width(config)
        if self.ratio * width < 1:
            allowed = f"at least {1 / width:.3g}, so that each block of {width} components keeps one"
            raise UserError("ratio", self.ratio, allowed)

    def install(self, model: PreTrainedModel) -> None:
        """Replace a model's key and value projections by spectra.

        Raises:
            UserError: as in :meth:`check`, or the projections are not plain linear layers.
        """
        config = model.config.get_text_config()
        self.check(config)
        with _said_of_spectra():
            layers = projections(model)
        for index, attention in enumerate(layers):
            for name in PROJECTIONS if index not in self.dense_layers else ():
                linear = getattr(attention, name)
                if type(linear) is not nn.Linear:
                    raise UserError("spectra", type(linear).__name__, reason="is not a plain linear layer")
                setattr(attention, name, SpectrumLinear(linear, self.low_rank.blocks(config)))

    def kept(self, scores: Mapping[str, Tensor], whole: int) -> list[Tensor]:
        """The components to keep, (G, R) bool on the CPU for each layer.

        Args:
            scores: (G, R) for each layer, by its name in the model.
            whole: how many numbers a token's keys and values have in these layers.
        """
        layers = [int(found[1]) if (found := _LAYER.search(name)) else 0 for name in scores]
        return pruned(list(scores.values()), layers, self.threshold, int(self.ratio * whole + 0.5))

    def folded(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The weights of the low-rank model that equals a model with spectra and only its kept components.

        Scores are multiplied into the right factors, B. Nonzero deviations become biases.

        Args:
            weights: weights of a model with spectra, by name.
        """
        names = [name.removesuffix(_LOGITS) for name in weights if name.endswith(_LOGITS)]
        parts = {name: {part: weights[f"{name}.{part}"] for part in _PARTS} for name in names}
        scores = {name: scores_of(part["logits"]) for name, part in parts.items()}
        kept = self.kept(scores, sum(len(part["deviation"]) for part in parts.values()))
        own = {f"{name}.{part}" for name in names for part in (*_PARTS, "bias")}
        found = {name: weight for name, weight in weights.items() if name not in own}
        for (name, part), of_layer in zip(parts.items(), kept, strict=True):
            own_bias, deviation = weights.get(f"{name}.bias"), part["deviation"]
            bias: Tensor | None = deviation if own_bias is None else deviation + own_bias
            if own_bias is None and not deviation.any():
                bias = None
            scale = part["sigma"] * scores[name]
            factors = [
                (right[of_block].T, (left[:, of_block] * of_scale[of_block]).T)
                for left, of_scale, right, of_block in zip(part["left"], scale, part["right"], of_layer, strict=True)
            ]
            layer = LowRankLinear.of(factors, bias)
            found |= {f"{name}.{each}": weight for each, weight in layer.state_dict().items()}
        return found


@contextlib.contextmanager
def _said_of_spectra() -> Iterator[None]:
    """Rename error fields from low_rank to the corresponding ones of spectra."""
    try:
        yield
    except UserError as error:
        field = error.field.removeprefix("low_rank.").replace("low_rank", "spectra")
        raise UserError(field, error.value, error.allowed, reason=error.reason) from error
