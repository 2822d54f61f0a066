"""Low-rank factors of the key and value projections, so that a cache needs to hold only their inner activations.

LoRC (arXiv 2410.03111) replaces the key and value projections by truncated singular value decompositions. Its formula
for progressive ranks was written from memory, not checked in the paper, so report results as "LoRC, schedule as
recalled".
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lrsa_lit.bounds import check_setting, is_integer
from lrsa_lit.errors import UserError
from lrsa_lit.paths import expanded

FACTOR_FILE = "low_rank.safetensors"
"""The file with a folder's factors, by their names in the model. The other files hold the whole matrices, for programs
that do not know factors."""
OTHERS = "leave low_rank out, or use a model with k_proj and v_proj in each layer, such as Llama, Qwen or Mistral"


@dataclass(frozen=True)
class LowRank:
    """Compute keys and values from latents of a lower rank (LoRC, arXiv 2410.03111), with or without whitening.

    When the model is loaded, W_k and W_v (d, H D) of each layer become A (d, r) and B (r, H D). These are the best of
    rank r in the Frobenius norm or, with whitening, for the layer's outputs (SVD-LLM, arXiv 2403.07378; not in LoRC).
    Training then changes the factors, and checkpoints hold them. So a model from a checkpoint is never factored again
    and needs no file of moments. If the other weights are quantised, factors keep the model's dtype. If
    r > d H D / (d + H D), the factors have more weights than W, so only the cache shrinks.

    Args:
        ratio: mean rank as a share of the factored matrix's width, in (0, 1]; null if ``rank`` is given.
        rank: mean rank of each factored matrix; null if ``ratio`` is given.
        schedule: "uniform" for the same rank in each layer, or "progressive" for ranks that decrease with depth,
            because later layers amplify the errors of early ones.
        min_share: the last layer's rank as a share of the first layer's, in the progressive schedule.
        grouping: "joint" factors a layer's whole matrix; "head" factors each key-value head's matrix separately, so
            that heads which keep different tokens have different latents.
        whitening: a file of the layers' input moments from ``lrsa input-moments``; null does not whiten.
        sha256: expected SHA-256 of that file; null skips the check.
        dense_layers: layers that are not factored.
    """

    ratio: float | None = None
    rank: int | None = None
    schedule: Literal["uniform", "progressive"] = "uniform"
    min_share: float = 0.5
    grouping: Literal["joint", "head"] = "joint"
    whitening: str | None = None
    sha256: str | None = None
    dense_layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if (self.ratio is None) == (self.rank is None):
            given = "both" if self.rank is not None else "neither"
            raise UserError("ratio", reason=f"{given} of ratio and rank is given", allowed="one of them, such as 0.5")
        if self.ratio is not None:
            check_setting("ratio", self.ratio, 0.0 < self.ratio <= 1.0, "above 0 and at most 1")
        if self.rank is not None:
            check_setting("rank", self.rank, is_integer(self.rank) and self.rank >= 1, "an integer >= 1")
        check_setting("min_share", self.min_share, 0.0 < self.min_share <= 1.0, "above 0 and at most 1")
        object.__setattr__(self, "dense_layers", tuple(sorted(set(self.dense_layers))))

    def check(self, config: Any) -> None:
        """Refuse an unsuitable model by its config, before its weights are read, and a missing file of moments.

        Args:
            config: the text model's config.

        Raises:
            UserError: the model shares keys and values between layers, stores them compressed (MLA), lacks one of the
                dense layers, or is too narrow for the rank; or the file of moments is missing.
        """
        if getattr(config, "kv_lora_rank", None):
            raise UserError("low_rank", config.model_type, reason="stores latents already (MLA)", hint=OTHERS)
        if getattr(config, "num_kv_shared_layers", None):
            raise UserError("low_rank", config.model_type, reason="shares keys and values between layers", hint=OTHERS)
        layers = config.num_hidden_layers
        if outside := [layer for layer in self.dense_layers if not 0 <= layer < layers]:
            raise UserError("low_rank.dense_layers", outside, f"from 0 to {layers - 1}")
        if len(self.dense_layers) == layers:
            raise UserError("low_rank.dense_layers", reason="includes all layers", hint="leave low_rank out")
        self.mean_rank(config)
        self.moments_file()

    def moments_file(self) -> Path | None:
        """The file of moments, or None; a UserError if it is missing or has another SHA-256 than expected."""
        if (name := self.whitening) is None:
            return None
        path = expanded("low_rank.whitening", name)
        if not path.is_file():
            reason, hint = "is not a file", "write it with `lrsa input-moments --to FILE …`, or set whitening: null"
            raise UserError("low_rank.whitening", name, reason=reason, hint=hint)
        if self.sha256 is not None:
            from lrsa_lit.io import sha256_of

            if (found := sha256_of(path)) != self.sha256:
                raise UserError("low_rank.sha256", self.sha256, f"{found}, that of the file, or null")
        return path

    def mean_rank(self, config: Any) -> int:
        """The mean rank of each factored matrix; a UserError if it exceeds the matrix's width."""
        width = min(self.width(config), config.hidden_size)
        rank = max(int((self.ratio or 0.0) * width + 0.5), 1) if self.rank is None else self.rank
        if rank > width:
            what = "each head's keys" if self.grouping == "head" else "a layer's keys"
            raise UserError("low_rank.rank", rank, f"at most {width}, the width of {what}")
        return rank

    def latent_bytes(self, config: Any, itemsize: int) -> float:
        """Bytes that a cache of latents holds per token and key-value head, mean over layers.

        A position takes 4 bytes. With grouping "joint", all heads of a layer share one latent and one position.
        """
        layers, heads, blocks = int(config.num_hidden_layers), self.heads(config), self.blocks(config)
        whole = len(self.dense_layers)
        latent = blocks / heads * (2 * self.total_rank(config) / (layers - whole) * itemsize + 4)
        return float((layers - whole) * latent + whole * 2 * self.head_dim(config) * itemsize) / layers

    def total_rank(self, config: Any) -> int:
        """The sum over layers of the rank of a factored matrix."""
        layers = int(config.num_hidden_layers) - len(self.dense_layers)
        mean = self.mean_rank(config)
        if self.ratio is None or self.schedule == "uniform":
            return mean * layers
        width = min(self.width(config), int(config.hidden_size))
        return max(int(self.ratio * layers * width + 0.5), layers)

    @staticmethod
    def heads(config: Any) -> int:
        """Key-value heads per layer."""
        return int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)

    @staticmethod
    def head_dim(config: Any) -> int:
        """Channels per head."""
        return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)

    def width(self, config: Any) -> int:
        """Columns of each factored matrix: D for one head, or H D for all key-value heads of a layer."""
        return self.head_dim(config) * (1 if self.grouping == "head" else self.heads(config))

    def blocks(self, config: Any) -> int:
        """The number of matrices per layer in which keys, or values, are factored."""
        return self.heads(config) if self.grouping == "head" else 1
