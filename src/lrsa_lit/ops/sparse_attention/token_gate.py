"""Selection by a gate: a linear map of a token's hidden state, in front of the attention, to a score of each head.

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
"""The tensor (layers, H, width) in a file of gates."""


@dataclass(frozen=True)
class TokenGate(Selector):
    """Keep the tokens that a gate scores highest: its weights times the hidden state that the layer's keys are made of.

    The gate is KVzap's linear one (arXiv 2601.07891), distilled from KVzip's scores. Ours is that each partition
    chooses K of its own tokens, in training as well; KVzap drops what is below a threshold. An offset of a head would
    change no choice, so there is none. The weights are constants, not parameters of the model: they stay in their file,
    and what was trained with them names it and its SHA-256.

    Args:
        weights: path of a safetensors file with ``token_gates`` (layers, H, width of the hidden states), as a training
            of gates writes it; null draws them at random, which is the control.
        seed: of random weights.
        sha256: of the file, filled in when it is read; a file of another one is refused.

    Raises:
        UserError: a file that cannot be read, is another one than was used or holds no gates.
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
            reason = f"holds other gates than those that were used, whose SHA-256 is {self.sha256}"
            raise UserError("weights", self.weights, reason=reason)
        object.__setattr__(self, "weights", str(path))
        object.__setattr__(self, "sha256", digest)
        _gates_in(path, digest)

    def gate(self, layer: int, layers: int, heads: int, width: int) -> Tensor:
        """The weights (H, width) of a layer, float32.

        Raises:
            UserError: the file's are of another model.
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
        """(B, H, P, L), as they came with the keys."""
        assert partitions.token_scores is not None
        return partitions.token_scores


def _digest_of(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise UserError("weights", str(path), reason=f"cannot be read ({error.strerror})") from None


@functools.lru_cache(maxsize=8)
def _gates_in(path: Path, digest: str) -> Tensor:
    """The gates of a file of that digest, float32 (layers, H, width)."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        found: dict[str, Any] = load(path.read_bytes())
    except (OSError, SafetensorError) as error:
        raise UserError("weights", str(path), reason=f"is no safetensors file ({message_of(error)})") from None
    gates = found.get(NAME)
    if gates is None or gates.ndim != 3 or not gates.is_floating_point() or not bool(gates.isfinite().all()):
        raise UserError("weights", str(path), reason=f"has no finite numbers {NAME} (layers, heads, width)")
    loaded: Tensor = gates.float()
    return loaded
