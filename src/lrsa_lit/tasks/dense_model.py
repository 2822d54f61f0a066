"""A trained model with its own dense attention, for generating text outside runs.

Dimensions: B prompts, T tokens of the longest prompt.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lrsa_lit.attention import base_of
from lrsa_lit.models import uncompiled
from lrsa_lit.models.checkpoint import Trained
from lrsa_lit.models.generation import before_stop, stop_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class DenseModel:
    """A frozen model and its tokenizer on a device. It uses dense attention, even if it was trained with a rule.

    Args:
        trained: the model, which is loaded here.
        device: the device to run on.
    """

    def __init__(self, trained: Trained, device: torch.device) -> None:
        from transformers import GenerationConfig

        self.device = device
        self.tokenizer: PreTrainedTokenizerBase = trained.tokenizer
        self.model: Any = base_of(trained.build().to(device).eval().requires_grad_(False))
        # A model's generation defaults, such as a repetition penalty, would change the greedy choice.
        self.model.generation_config = GenerationConfig()
        self._stops = stop_tokens(self.tokenizer)

    @torch.no_grad()
    def answers(self, prompts: Tensor, mask: Tensor, max_new_tokens: int, **drawing: Any) -> list[str]:
        """The generated text after each prompt, up to a special token.

        Args:
            prompts: (B, T) int64, padded on the left.
            mask: (B, T) int64, 1 for tokens and 0 for padding.
            max_new_tokens: the most tokens of an answer.
            drawing: sampling arguments of transformers' ``generate``; without any, decoding is greedy.
        """
        ends = {"max_new_tokens": max_new_tokens, "eos_token_id": self._stops, "pad_token_id": self._stops[0]}
        options = {"attention_mask": mask.to(self.device), "use_cache": True, "do_sample": bool(drawing), **ends}
        with uncompiled():
            found = self.model.generate(prompts.to(self.device), **options, **drawing)
        rows = [before_stop(row, self._stops) for row in found[:, prompts.shape[1] :].tolist()]
        return [text.strip() for text in self.tokenizer.batch_decode(rows, skip_special_tokens=True)]
