"""A causal language model some of whose tokens are vectors.

Dimensions: B rows, T tokens, V vectors, h width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lrsa_lit.attention import base_of


class SoftTokens:
    """A model that takes the token id -1 - i for vector i, and is itself in all else.

    So whatever hands token ids to a model works with vectors among them: output heads, prefill, greedy decoding.

    Args:
        model: a causal language model of transformers, or peft's wrapper around it.

    Attributes:
        vectors: (V, h), which gradients flow to.
    """

    vectors: Tensor

    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(self, input_ids: Tensor, **inputs: Any) -> Any:
        """The model's output for ids (B, T)."""
        return self.model(inputs_embeds=self.embedded(input_ids), **inputs)

    def embedded(self, ids: Tensor) -> Tensor:
        """(B, T, h) of ids (B, T), in the dtype of the model's embeddings."""
        tokens: Tensor = self.model.get_input_embeddings()(ids.clamp(min=0))
        vectors = self.vectors[(-1 - ids).clamp(min=0)]
        return torch.where((ids < 0)[..., None], vectors.to(tokens.dtype), tokens)

    def get_base_model(self) -> Any:
        """The model of transformers."""
        return base_of(self.model)

    def __getattr__(self, name: str) -> Any:
        """Anything else of the model."""
        return getattr(self.model, name)
