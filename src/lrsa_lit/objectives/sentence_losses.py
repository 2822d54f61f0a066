"""The losses of CPC's sentence encoder (arXiv 2409.01227): contrastive, and masked next-token prediction.

Dimensions: B questions, N candidates, D width of the model, T tokens of the longest context.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from lrsa_lit.data.collate import IGNORE_INDEX


def contrastive_loss(
    questions: Tensor, candidates: Tensor, scale: float = 20.0, others: Tensor | None = None
) -> Tensor:
    """Mean cross-entropy of each question's positive among all candidates; logits are ``scale`` times the cosines.

    Args:
        questions: (B, D).
        candidates: (N, D), N >= B. Candidate i is the positive of question i; those from B on are only negatives.
        scale: the inverse temperature.
        others: (B, N) bool, candidates that also support a question and so must not count as its negatives.

    Returns:
        A scalar, at least float32.
    """
    dtype = torch.promote_types(candidates.dtype, torch.float32)
    with torch.autocast(candidates.device.type, enabled=False):
        logits = scale * normalize(questions.to(dtype), dim=-1) @ normalize(candidates.to(dtype), dim=-1).mT
        if others is not None:
            logits = logits.masked_fill(others, -torch.inf)
        return cross_entropy(logits, torch.arange(len(questions), device=logits.device))


def masked(ids: Tensor, mask: Tensor, mask_id: int, share: float = 0.8) -> tuple[Tensor, Tensor]:
    """Replace each token of the contexts by a mask token with some probability.

    Args:
        ids: (B, T) int64.
        mask: (B, T), 1 for tokens and 0 for padding.
        mask_id: the mask token.
        share: the probability.

    Returns:
        The masked ids (B, T), and int64 labels (B, T), -100 where a token was not replaced.
    """
    hidden = (torch.rand(ids.shape, device=ids.device) < share) & mask.bool()
    return ids.masked_fill(hidden, mask_id), ids.masked_fill(~hidden, IGNORE_INDEX)


def predicting(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Where masked tokens are predicted: at the position before each, as in causal language models.

    Args:
        labels: (B, T), -100 for tokens that are not predicted. A row's first token is never predicted.

    Returns:
        (B, T) bool, and the M labels in the order of these positions.
    """
    following = labels.roll(-1, dims=1)
    following[:, -1] = IGNORE_INDEX
    where = following != IGNORE_INDEX
    return where, following[where]
