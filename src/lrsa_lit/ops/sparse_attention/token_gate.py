"""Selection by a gate: a linear map from a token's hidden state, before the attention, to one score per head.

Dimensions: B batch, H key-value heads, P partitions, L lag_size.
"""

from __future__ import annotations

import functools
import hashlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from lrsa_lit.bounds import check_setting, is_integer
from lrsa_lit.errors import UserError, message_of
from lrsa_lit.ops.sparse_attention.compressors import Partitions, Selector
from lrsa_lit.paths import expanded

NAME = "token_gates"
"""The name of the tensor (layers, H, width) in a file of gates."""


@dataclass(frozen=True)
class TokenGate(Selector):
    """Keep the tokens with the highest gate score: the gate's weights times the hidden state that keys are made from.

    The gate is KVzap's linear one (arXiv 2601.07891), distilled from KVzip's scores. KVzap drops tokens below a
    threshold; here each partition keeps K of its own tokens, in training as well. A bias per head would not change the
    choice, so there is none. The weights are constants, not parameters of the model: they stay in their file, and
    checkpoints record its path and SHA-256.

    Args:
        weights: path of a safetensors file with ``token_gates`` (layers, H, width of the hidden states), as written by
            gate training. null draws random weights, as a control.
        seed: seed of the random weights.
        sha256: SHA-256 of the file. It is filled in when the file is read; a file with another hash is refused.

    Raises:
        UserError: the file cannot be read, has another SHA-256, or holds no gates.
    """

    weights: str | None = None
    seed: int = 0
    sha256: str | None = None
    takes_scores: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_setting("seed", self.seed, is_integer(self.seed), "an integer")
        if self.weights is None:
            check_setting("sha256", self.sha256, self.sha256 is None, "null without a file of weights")
            return
        check_setting("weights", self.weights, isinstance(self.weights, str), "the path of a file, or null")
        path = expanded("weights", self.weights).absolute()
        digest = _digest_of(path)
        if self.sha256 not in (None, digest):
            reason = f"has another SHA-256 than the gates that were used ({self.sha256})"
            raise UserError("weights", self.weights, reason=reason)
        object.__setattr__(self, "weights", str(path))
        object.__setattr__(self, "sha256", digest)
        _gates_in(path, digest)

    def gate(self, layer: int, layers: int, heads: int, width: int) -> Tensor:
        """The weights (H, width) of a layer, float32.

        Raises:
            UserError: the file's gates are for a model of another shape.
        """
        if self.weights is None:
            generator = torch.Generator().manual_seed((self.seed * 1_000_003 + layer) % 2**63)
            return torch.randn(heads, width, generator=generator) / math.sqrt(width)
        assert self.sha256 is not None
        gates = _gates_in(Path(self.weights), self.sha256)
        if gates.shape != (layers, heads, width):
            layers_has, heads_has, width_has = gates.shape
            has = f"{layers_has} layers of {heads_has} heads and width {width_has}"
            needs = f"{layers} of {heads} and width {width}"
            raise UserError(
                "compressor.init_args.weights", self.weights, reason=f"holds gates of {has}; the model has {needs}"
            )
        return gates[layer]

    def score(self, partitions: Partitions) -> Tensor:
        """The scores (B, H, P, L) that came with the keys."""
        assert partitions.token_scores is not None
        return partitions.token_scores


def _digest_of(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise UserError("weights", str(path), reason=f"cannot be read ({error.strerror})") from None


@functools.lru_cache(maxsize=8)
def _gates_in(path: Path, digest: str) -> Tensor:
    """The gates in a file, float32 (layers, H, width); the digest is part of the cache key."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        found: dict[str, Any] = load(path.read_bytes())
    except (OSError, SafetensorError) as error:
        raise UserError("weights", str(path), reason=f"is not a safetensors file ({message_of(error)})") from None
    gates = found.get(NAME)
    if gates is None or gates.ndim != 3 or not gates.is_floating_point() or not bool(gates.isfinite().all()):
        raise UserError("weights", str(path), reason=f"has no tensor {NAME} (layers, heads, width) of finite numbers")
    loaded: Tensor = gates.float()
    return loaded
