"""Learned vectors that summarise a text by cross-attention over its embeddings (IC-Former, arXiv 2406.13618).

Dimensions: N chunks, T embeddings of the longest chunk, k digests, h width, D head_dim.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import silu
from transformers import PreTrainedConfig

from lrsa_lit.attention.budgets import heads_of
from lrsa_lit.errors import UserError
from lrsa_lit.ops.sdpa import sdpa
from lrsa_lit.ops.sparse_attention import Rotary

_SPREAD = 0.02
"""Standard deviation of random weights."""


class DigestReader(nn.Module):
    """Makes k digests of a chunk: learned vectors pass through cross-attention layers, each followed by a SwiGLU.

    Every layer's keys and values come from [embeddings; learned vectors], which no layer changes. Digest i attends to
    all embeddings and to the learned vectors 0 to i. Keys have the positions 0 to n + k - 1, queries the last k. The
    number of heads, the widths, the norms' epsilon and the base of RoPE are the LLM's. Weights are separate, and there
    are no biases.

    Args:
        config: config of the LLM's text model; its position scaling is ignored.
        count: k, the number of digests.
        layers: number of cross-attention layers.
        init: initial values of the learned vectors: ``zeros`` as in the paper's code, or ``normal``.

    Raises:
        UserError: the LLM has several kinds of rotary positions or none, or rotates only a part of its channels.
    """

    def __init__(
        self, config: PreTrainedConfig, count: int, layers: int, init: Literal["zeros", "normal"] = "zeros"
    ) -> None:
        super().__init__()
        width = config.hidden_size
        self.initial = nn.Parameter(torch.zeros(count, width))
        self.layers = nn.ModuleList(_Layer(config) for _ in range(layers))
        self.norm = nn.RMSNorm(width, eps=config.rms_norm_eps)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=_SPREAD)
        if init == "normal":
            nn.init.normal_(self.initial, std=_SPREAD)
        self._rotary = _rotary_of(config)

    def forward(self, embeddings: Tensor, lengths: Tensor) -> Tensor:
        """Read N chunks, each independently.

        Args:
            embeddings: (N, T, h), padded on the right.
            lengths: (N,) int64, the number of embeddings in each chunk, at least 1.

        Returns:
            (N, k, h).
        """
        (chunks, longest, _), count = embeddings.shape, len(self.initial)
        digests = self.initial.expand(chunks, -1, -1)
        context = torch.cat([embeddings.to(self.initial.dtype), digests], dim=1)
        place, own = (torch.arange(size, device=embeddings.device) for size in (longest, count))
        behind = lengths[:, None] + own  # (N, k)
        at = torch.cat([place.expand(chunks, -1), behind], dim=1)[:, None]  # (N, 1, T + k)
        real = (place < lengths[:, None])[:, None].expand(-1, count, -1)
        seen = torch.cat([real, (own <= own[:, None]).expand(chunks, -1, -1)], dim=2)[:, None]  # (N, 1, k, T + k)
        hidden = digests
        for layer in self.layers:
            hidden = layer(hidden, context, seen, self._rotary, behind[:, None], at)
        read: Tensor = self.norm(hidden)
        return read


class _Layer(nn.Module):
    """Cross-attention and SwiGLU, each with pre-norm and a residual connection."""

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__()
        width, inner = config.hidden_size, config.intermediate_size
        heads = config.num_attention_heads
        self.dim = getattr(config, "head_dim", None) or width // heads
        norms = [nn.RMSNorm(width, eps=config.rms_norm_eps) for _ in range(3)]
        self.norm_query, self.norm_context, self.norm_inner = norms
        self.q = nn.Linear(width, heads * self.dim, bias=False)
        self.k, self.v = (nn.Linear(width, heads_of(config) * self.dim, bias=False) for _ in range(2))
        self.o = nn.Linear(heads * self.dim, width, bias=False)
        self.gate, self.up = (nn.Linear(width, inner, bias=False) for _ in range(2))
        self.down = nn.Linear(inner, width, bias=False)

    def forward(
        self, hidden: Tensor, context: Tensor, seen: Tensor, rotary: Rotary, behind: Tensor, at: Tensor
    ) -> Tensor:
        context = self.norm_context(context)
        query, key, value = (
            part.unflatten(2, (-1, self.dim)).transpose(1, 2)
            for part in (self.q(self.norm_query(hidden)), self.k(context), self.v(context))
        )
        query, key = rotary.rotate(query, behind).to(value.dtype), rotary.rotate(key, at).to(value.dtype)
        # The fused kernels compute the softmax in float32.
        attended = sdpa(query, key, value, mask=seen, enable_gqa=True)
        hidden = hidden + self.o(attended.transpose(1, 2).flatten(2))
        inner = self.norm_inner(hidden)
        changed: Tensor = hidden + self.down(silu(self.gate(inner)) * self.up(inner))
        return changed


def _rotary_of(config: PreTrainedConfig) -> Rotary:
    """The rotation from an LLM's config, without scaling, because no chunk is longer than the training length."""
    found = getattr(config, "rope_parameters", None) or {}
    if "rope_theta" not in found or found.get("partial_rotary_factor", 1.0) != 1.0:
        reason = "does not rotate all channels by one kind of rotary positions, which digests need"
        raise UserError("backbone", config.model_type, reason=reason)
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return Rotary.plain(dim, found["rope_theta"])
