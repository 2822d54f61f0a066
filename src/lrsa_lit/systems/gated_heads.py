"""The attention with which DuoAttention's gates are trained.

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
    """Each head mixes full attention, weighted by its gate g, and streaming attention, weighted by 1 - g.

    For training only: both attentions are computed, so nothing is saved. ``to_dict`` returns the DuoAttention with the
    current gates.

    Args:
        gates: returns the gates (N, H), differentiable.
        sink_size: number of first tokens that streaming attention sees.
        recent: number of last tokens that streaming attention sees, including the query's own.
    """

    gates: Callable[[], Tensor]
    sink_size: int
    recent: int
    trains: ClassVar[bool] = True

    def stream(self, place: Place, impl: Impl) -> Stream:
        """Refused: this system has no cache."""
        raise UserError("system", reason="trains gates and has no cache", hint="use DuoAttention to generate answers")

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, *, cu_seqlens: Tensor | None, scale: float, place: Place
    ) -> Tensor:
        """See :class:`System`."""
        sizes: dict[str, Any] = {"sink": self.sink_size, "recent": self.recent, "scale": scale}
        of_layer = self.gates()[place.layer]
        parts = sequences(query, key, value, cu_seqlens)
        return torch.cat([gated_attention(*part, of_layer, **sizes) for part in parts], dim=2)

    def attended_pairs(self, length: int) -> int:
        """The pairs of both attentions."""
        return attended_pairs(length, None) + streaming_pairs(length, self.sink_size, self.recent)

    def to_dict(self) -> dict[str, Any]:
        """The settings of the DuoAttention with the current gates, which can be read again."""
        return DuoAttention(self.gates().tolist(), sink_size=self.sink_size, recent=self.recent).to_dict()
