"""More positions than a model was trained with, by scaling its rotary frequencies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from lrsa_lit.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

LARGEST_FACTOR = 1_000_000
"""More positions than any tokens that fit into memory."""


@dataclass(frozen=True)
class RopeScaling:
    """Give a model more positions than it was trained with; fine-tuning at the new length then makes them good ones.

    It becomes ``rope_parameters`` and ``max_position_embeddings`` of transformers' config, and so is saved with it.

    Args:
        rope_type: "yarn" (arXiv 2309.00071: slow frequencies are interpolated, fast ones kept, attention tempered) or
            "linear" (all are interpolated).
        factor: how many times the original positions there are to be.
        original_max_position_embeddings: positions of the pre-training; null takes the model's. A model that is scaled
            already needs it said, for its scaling is replaced.
    """

    rope_type: Literal["yarn", "linear"]
    factor: float
    original_max_position_embeddings: int | None = None

    def __post_init__(self) -> None:
        if not 1.0 <= self.factor <= LARGEST_FACTOR:
            raise UserError("factor", self.factor, f"a number from 1 to {LARGEST_FACTOR:,}")
        original = self.original_max_position_embeddings
        if original is not None and original < 1:
            raise UserError("original_max_position_embeddings", original, "an integer >= 1")

    def apply(self, config: PreTrainedConfig) -> None:
        """Write the scaling into a text model's config, in place; one that has it already stays as it is.

        A UserError if the model has no rotary positions of one kind for all layers, or is scaled otherwise.
        """
        present = getattr(config, "rope_parameters", None)
        positions = getattr(config, "max_position_embeddings", None)
        if not positions or not present or "rope_type" not in present:
            reason = "has no rotary positions of one kind for all layers that could be scaled"
            raise UserError("rope_scaling", config.model_type, reason=reason)
        asked, found = self.original_max_position_embeddings, present.get("original_max_position_embeddings")
        same = (present["rope_type"], present.get("factor")) == (self.rope_type, self.factor)
        if same and (asked is None or found is None or asked == found):
            return
        if present["rope_type"] != "default" and asked is None:
            scaling = f"{present['rope_type']}, factor {present.get('factor')}, {positions} positions"
            how = "to replace that give original_max_position_embeddings, too"
            raise UserError("rope_scaling", reason=f"the model is scaled already ({scaling}); {how}")
        original = asked or positions
        kept = {name: present[name] for name in ("rope_theta", "partial_rotary_factor") if name in present}
        scaled: dict[str, Any] = {**kept, "rope_type": self.rope_type, "factor": float(self.factor)}
        if self.rope_type == "yarn":
            scaled["original_max_position_embeddings"] = original
        config.rope_parameters = scaled
        config.max_position_embeddings = int(original * self.factor)
        config.standardize_rope_params()
        config.validate_rope()
