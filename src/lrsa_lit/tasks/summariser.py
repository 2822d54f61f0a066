"""A model that shortens passages one by one, without knowing the question (CoLoR, arXiv 2412.18232)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

import torch

from lrsa_lit.attention.decoding.turns import left_padded
from lrsa_lit.data.messages import render_messages
from lrsa_lit.data.preferences import PROMPT
from lrsa_lit.data.tokenization import encode_text
from lrsa_lit.errors import UserError
from lrsa_lit.models.checkpoint import Trained
from lrsa_lit.tasks.dense_model import DenseModel


class Summariser:
    """Writes summaries, greedily or by sampling.

    Args:
        trained: the model, which is loaded here.
        device: the device to run on.
        max_new_tokens: the most tokens of a summary.
    """

    def __init__(self, trained: Trained, device: torch.device, max_new_tokens: int) -> None:
        self._writer, self.max_new_tokens = DenseModel(trained, device), max_new_tokens
        positions = getattr(trained.backbone.config, "max_position_embeddings", None)
        self._most = None if positions is None else positions - max_new_tokens

    def summaries(self, passages: Sequence[str]) -> list[str]:
        """A greedy summary of each passage, which may be empty.

        Raises:
            UserError: a passage leaves no room for a summary in the model's positions.
        """
        return self._writer.answers(*left_padded(list(map(self._prompt, passages))), self.max_new_tokens)

    def drawn(self, passage: str, count: int, temperature: float, seed: str) -> list[str]:
        """``count`` sampled summaries of one passage, reproducible by their seed."""
        prompts, device = left_padded([self._prompt(passage)] * count), self._writer.device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(int.from_bytes(hashlib.sha256(seed.encode()).digest()[:7]))
            return self._writer.answers(*prompts, self.max_new_tokens, temperature=temperature, top_k=0, top_p=1.0)

    def _prompt(self, passage: str) -> torch.Tensor:
        tokenizer = self._writer.tokenizer
        rendered = render_messages([{"role": "user", "content": PROMPT.format(passage=passage)}], tokenizer)
        ids = list(encode_text(tokenizer, rendered.text, rendered.user).ids)
        if self._most is not None and len(ids) > self._most:
            reason = f"leaves {self._most} positions for prompts, but a passage's prompt has {len(ids)} tokens"
            raise UserError("--max-new-tokens", self.max_new_tokens, reason=reason)
        return torch.tensor(ids)


def digest_of_summaries(model: str, trained: Trained, max_new_tokens: int) -> str:
    """A digest of everything that determines summaries: the model, the prompt, template arguments and the length."""
    parts = [model, PROMPT, trained.template_arguments, max_new_tokens]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
