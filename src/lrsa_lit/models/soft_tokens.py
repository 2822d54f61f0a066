"""A causal language model that takes vectors as some of its tokens.

Dimensions: B rows, T tokens, V vectors, h width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lrsa_lit.attention import base_of


class SoftTokens:
    """Wraps a model so that the token id -1 - i stands for vector i; everything else is passed through.

    So code that passes token ids to a model also works with vectors: output heads, prefill, greedy decoding.

    Args:
        model: a causal language model of transformers, or peft's wrapper around it.

    Attributes:
        vectors: (V, h), the vectors, which can get gradients.
    """

    vectors: Tensor

    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(self, input_ids: Tensor, **inputs: Any) -> Any:
        """The model's output for ids (B, T)."""
        return self.model(inputs_embeds=self.embedded(input_ids), **inputs)

    def embedded(self, ids: Tensor) -> Tensor:
        """Embeddings (B, T, h) of ids (B, T), in the dtype of the model's embeddings."""
        tokens: Tensor = self.model.get_input_embeddings()(ids.clamp(min=0))
        vectors = self.vectors[(-1 - ids).clamp(min=0)]
        return torch.where((ids < 0)[..., None], vectors.to(tokens.dtype), tokens)

    def get_base_model(self) -> Any:
        """The wrapped transformers model, without peft's wrapper."""
        return base_of(self.model)

    def __getattr__(self, name: str) -> Any:
        """Other attributes are the model's."""
        return getattr(self.model, name)
