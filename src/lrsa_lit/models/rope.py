"""Give a model more positions than it was trained with, by scaling its rotary frequencies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from lrsa_lit.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

LARGEST_FACTOR = 1_000_000
"""The largest factor: it gives more positions than any memory can hold."""


@dataclass(frozen=True)
class RopeScaling:
    """Give a model more positions than it was trained with. Fine-tuning at the new length then improves them.

    The scaling is written to ``rope_parameters`` and ``max_position_embeddings`` of transformers' config and saved with
    it.

    Args:
        rope_type: "yarn" (arXiv 2309.00071: interpolates low frequencies, keeps high ones and scales the attention) or
            "linear" (interpolates all frequencies).
        factor: factor by which the number of positions grows.
        original_max_position_embeddings: number of positions in pre-training; null takes the model's. It is required
            for a model that is scaled already, whose scaling is then replaced.
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
        """Write the scaling into a text model's config, in place. A config with the same scaling is not changed.

        Raises:
            UserError: the model does not have the same kind of rotary positions in all layers, or is scaled
                differently.
        """
        present = getattr(config, "rope_parameters", None)
        positions = getattr(config, "max_position_embeddings", None)
        if not positions or not present or "rope_type" not in present:
            reason = "cannot be scaled, because it does not have the same kind of rotary positions in all layers"
            raise UserError("rope_scaling", config.model_type, reason=reason)
        asked, found = self.original_max_position_embeddings, present.get("original_max_position_embeddings")
        same = (present["rope_type"], present.get("factor")) == (self.rope_type, self.factor)
        if same and (asked is None or found is None or asked == found):
            return
        if present["rope_type"] != "default" and asked is None:
            scaling = f"{present['rope_type']}, factor {present.get('factor')}, {positions} positions"
            how = "to replace this scaling, also set original_max_position_embeddings"
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
