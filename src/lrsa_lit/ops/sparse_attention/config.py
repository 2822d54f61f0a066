"""What the operator is told: the five numbers of the rule, the compressor, and the layers left dense."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from lrsa_lit.errors import UserError
from lrsa_lit.ops.sparse_attention.bounds import is_integer, is_weight
from lrsa_lit.ops.sparse_attention.compressors import Compressor, LagRelative


@dataclass(frozen=True)
class LRSAConfig:
    """The rule of lag-relative sparse attention (arXiv 2506.11498, arXiv 2504.04704).

    Args:
        sink_size: first tokens of a sequence that are never dropped (S >= 0).
        lag_size: tokens of a lag partition (L >= 2).
        top_k: key-value pairs kept of a partition, per KV head (0 <= K <= L). K = L drops nothing, K = 0 keeps sinks
            and the raw window only.
        chunk_size: tokens between two compressions (C >= 1); null means lag_size. Every C that divides L is one and
            the same rule.
        value_weight: weight of the value score beside the key score (w >= 0).
        dense_layers: indices of the layers left to the model's own attention; the operator itself ignores them.
        compressor: what turns a partition into K pairs; the default is lag-relative selection. Also as the dict that
            its ``to_dict`` made.

    Raises:
        UserError: a value outside its bounds, in one line.
    """

    sink_size: int = 16
    lag_size: int = 128
    top_k: int = 32
    chunk_size: int | None = None
    value_weight: float = 1.0
    dense_layers: tuple[int, ...] = ()
    compressor: Compressor = field(default_factory=LagRelative)

    def __post_init__(self) -> None:
        """Make the tuple and the compressor that JSON cannot write, then check each bound once."""
        if isinstance(self.dense_layers, Iterable) and not isinstance(self.dense_layers, str):
            object.__setattr__(self, "dense_layers", tuple(self.dense_layers))
        if not isinstance(self.compressor, Compressor):
            object.__setattr__(self, "compressor", Compressor.from_dict(self.compressor))
        self._check("sink_size", is_integer(self.sink_size) and self.sink_size >= 0, "an integer >= 0")
        self._check("lag_size", is_integer(self.lag_size) and self.lag_size >= 2, "an integer >= 2")
        self._check(
            "top_k",
            is_integer(self.top_k) and 0 <= self.top_k <= self.lag_size,
            f"an integer from 0 to lag_size ({self.lag_size})",
        )
        self._check(
            "chunk_size",
            self.chunk_size is None or (is_integer(self.chunk_size) and self.chunk_size >= 1),
            "an integer >= 1, or null for lag_size",
        )
        self._check("value_weight", is_weight(self.value_weight), "a finite number >= 0")
        self._check(
            "dense_layers",
            isinstance(self.dense_layers, tuple)
            and all(is_integer(layer) and layer >= 0 for layer in self.dense_layers)
            and len(set(self.dense_layers)) == len(self.dense_layers),
            "a list of different layer indices >= 0",
        )
        # 1 and 1.0 are one rule, so they must give one digest.
        object.__setattr__(self, "value_weight", float(self.value_weight))

    def _check(self, name: str, valid: bool, allowed: str) -> None:
        if not valid:
            raise UserError(name, getattr(self, name), allowed)

    @property
    def chunk(self) -> int:
        """C, the tokens between two compressions."""
        return self.lag_size if self.chunk_size is None else self.chunk_size

    @property
    def first_compression(self) -> int:
        """S + 2L, the first position at which a partition (with its reference) can be compressed."""
        return self.sink_size + 2 * self.lag_size

    def replace(self, **changes: Any) -> LRSAConfig:
        """A copy with other values; unknown names raise a UserError."""
        known = [item.name for item in dataclasses.fields(self)]
        for name in changes:
            if name not in known:
                raise UserError(name, reason=f"no such setting; there are {', '.join(known)}")
        return dataclasses.replace(self, **changes)

    def check_layers(self, count: int) -> None:
        """Raise a UserError if a dense layer is none of a model's ``count`` layers."""
        if unknown := [layer for layer in self.dense_layers if layer >= count]:
            raise UserError("dense_layers", unknown, f"a list of some of the model's layers, 0 to {count - 1}")

    def for_layer(self, layer: int) -> LRSAConfig | None:
        """The rule of one layer of a model, or None where the layer stays dense."""
        if layer in self.dense_layers:
            return None
        return dataclasses.replace(self, compressor=self.compressor.for_layer(layer))

    def to_dict(self) -> dict[str, Any]:
        """Plain values that JSON and YAML can hold; :meth:`from_dict` is the way back."""
        values = {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}
        return values | {"dense_layers": list(self.dense_layers), "compressor": self.compressor.to_dict()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> LRSAConfig:
        """The config that :meth:`to_dict` wrote.

        Raises:
            UserError: an unknown setting, a value out of bounds, or a compressor whose module is not imported.
        """
        if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
            raise UserError("values", values, "a dict of settings")
        return cls().replace(**values)

    def digest(self) -> str:
        """Twelve hex digits that change whenever the rule does."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()[:12]
