"""What CPC's sentence encoder minimises (arXiv 2409.01227): a contrastive loss and masked next-token prediction.

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
    """Mean cross-entropy of each question's own sentence among all candidates, by ``scale`` times their cosines.

    Args:
        questions: (B, D).
        candidates: (N, D), N >= B; the i-th is the positive of question i, those from B on are positives of none.
        scale: the inverse temperature.
        others: (B, N) bool, candidates that support a question without being its positive: no negatives of it.

    Returns:
        At least float32, no dimensions.
    """
    dtype = torch.promote_types(candidates.dtype, torch.float32)
    with torch.autocast(candidates.device.type, enabled=False):
        logits = scale * normalize(questions.to(dtype), dim=-1) @ normalize(candidates.to(dtype), dim=-1).mT
        if others is not None:
            logits = logits.masked_fill(others, -torch.inf)
        return cross_entropy(logits, torch.arange(len(questions), device=logits.device))


def masked(ids: Tensor, mask: Tensor, mask_id: int, share: float = 0.8) -> tuple[Tensor, Tensor]:
    """Contexts of which tokens are replaced, each with a probability, and the labels of those tokens.

    Args:
        ids: (B, T) int64.
        mask: (B, T), 1 on tokens and 0 on pads.
        mask_id: the token that stands in the place of others.
        share: the probability.

    Returns:
        What the model reads, and (B, T) int64 labels, -100 where a token was left.
    """
    hidden = (torch.rand(ids.shape, device=ids.device) < share) & mask.bool()
    return ids.masked_fill(hidden, mask_id), ids.masked_fill(~hidden, IGNORE_INDEX)


def predicting(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Where masked tokens are predicted: from the position before each, as a causal model was trained to.

    Args:
        labels: (B, T), -100 where nothing is predicted; a row's first token has no position before it.

    Returns:
        (B, T) bool, and the M labels in the order of these positions.
    """
    following = labels.roll(-1, dims=1)
    following[:, -1] = IGNORE_INDEX
    where = following != IGNORE_INDEX
    return where, following[where]
