"""The attention that DuoAttention's gates are trained under.

Dimensions: N layers, H key-value heads, Hq query heads, T tokens, D head_dim.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lrsa_lit.errors import UserError
from lrsa_lit.ops.sparse_attention import Impl, Stream, attended_pairs
from lrsa_lit.systems.duo_attention import DuoAttention, gated_attention
from lrsa_lit.systems.streaming import streaming_pairs
from lrsa_lit.systems.system import Place, System, sequences


@dataclass(frozen=True, eq=False)
class GatedHeads(System):
    """Each head attends to everything by its gate, and to sinks and recent tokens by the rest of 1.

    It is for training alone: nothing is saved while both are computed. Written down, it is the DuoAttention of the
    gates as they are.

    Args:
        gates: returns (N, H), with gradient.
        sink_size: first tokens that streaming attention sees.
        recent: last ones, the query's own among them.
    """

    gates: Callable[[], Tensor]
    sink_size: int
    recent: int
    trains: ClassVar[bool] = True

    def stream(self, place: Place, impl: Impl) -> Stream:
        """It has none."""
        raise UserError("system", reason="trains gates and holds no past", hint="answer under DuoAttention")

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, *, cu_seqlens: Tensor | None, scale: float, place: Place
    ) -> Tensor:
        """See :class:`System`."""
        sizes: dict[str, Any] = {"sink": self.sink_size, "recent": self.recent, "scale": scale}
        of_layer = self.gates()[place.layer]
        parts = sequences(query, key, value, cu_seqlens)
        return torch.cat([gated_attention(*part, of_layer, **sizes) for part in parts], dim=2)

    def attended_pairs(self, length: int) -> int:
        """Those of both attentions."""
        return attended_pairs(length, None) + streaming_pairs(length, self.sink_size, self.recent)

    def to_dict(self) -> dict[str, Any]:
        """As :class:`System` has it, in a form that can be read again."""
        return DuoAttention(self.gates().tolist(), sink_size=self.sink_size, recent=self.recent).to_dict()
