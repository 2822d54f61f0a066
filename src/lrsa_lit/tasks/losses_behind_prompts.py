"""Losses of answers after prompts in a compressed cache, for systems that cannot process whole sequences at once.

Dimensions: B examples, A tokens of the longest answer, V vocabulary.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, pad
from torch.nn.utils.rnn import pad_sequence

from lrsa_lit.attention import LRSACache, LRSAConfig, cache_argument, read_prompts
from lrsa_lit.attention.decoding.synced import most_of_all
from lrsa_lit.attention.decoding.turns import left_padded
from lrsa_lit.data.collate import IGNORE_INDEX, Batch
from lrsa_lit.models.head import losses_of_rows
from lrsa_lit.strategies import is_sharded
from lrsa_lit.tasks.attentions import needs_cache

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@torch.no_grad()
def losses_behind_prompts(model: Any, batch: Batch, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """The summed cross-entropy (B,) float64 of each answer, given its prompt in the cache.

    If several turns of a chat have a loss, the prompt ends before the first of them, and the rest counts as the answer.

    Args:
        model: a causal language model with a system enabled.
        batch: the batch to evaluate.
        tokenizer: the model's tokenizer, for systems that repeat the prompt.
    """
    prompts, mask, answers, labels = _in_two(batch)
    cache, synced = LRSACache.of(model), is_sharded(model)
    encode = functools.partial(tokenizer.encode, add_special_tokens=False)
    ends: Any = {"contexts": batch.get("context_length"), "first_turns": batch.get("first_turn")}
    logits, seen = read_prompts(model, cache, prompts, mask, **ends, encode=encode, synced=synced)
    return _losses(model, answers, labels, cache, logits, seen)


class LossesBehind:
    """The same losses, behind prompts that were read to answer them: :class:`~lrsa_lit.attention.Greedy` calls this.

    Args:
        model: as in :func:`losses_behind_prompts`.
        batch: the batch that is answered.

    Attributes:
        losses: (B,) float64, on the CPU, after the call.
    """

    def __init__(self, model: Any, batch: Batch) -> None:
        self.model = model
        *_, self.answers, self.labels = _in_two(batch)
        self.losses = torch.zeros(0, dtype=torch.float64)

    @classmethod
    def of(cls, model: Any, batch: Batch, rule: LRSAConfig | None) -> LossesBehind | None:
        """For a batch and a rule; None if its losses need no cache, or begin before its prompts end."""
        return cls(model, batch) if needs_cache(rule) and _is_one_answer(batch) else None

    def __call__(self, cache: LRSACache, logits: Tensor, seen: Tensor) -> None:
        """Continue the cache with the answers."""
        self.losses = _losses(self.model, self.answers, self.labels, cache, logits, seen).cpu()

    @property
    def found(self) -> tuple[Tensor, Tensor]:
        """The losses, and the number of tokens of each answer (B,)."""
        return self.losses, (self.labels != IGNORE_INDEX).sum(dim=1)


def _losses(model: Any, answers: Tensor, labels: Tensor, cache: LRSACache, logits: Tensor, seen: Tensor) -> Tensor:
    """The losses (B,) of answers and their labels (B, A) behind what :func:`read_prompts` has read."""
    if is_sharded(model):
        # All processes must call the model equally often, so answers are padded to the longest of all processes.
        missing = most_of_all(answers.shape[1], answers.device) - answers.shape[1]
        answers, labels = (pad(each, (0, missing), value=IGNORE_INDEX) for each in (answers, labels))
    losses = cross_entropy(logits[:, -1].float(), labels[:, 0], reduction="none").double()
    given, wanted = answers[:, :-1], labels[:, 1:]
    if not wanted.numel():
        return losses
    # The last token of a shorter answer predicts nothing, so it is masked like padding.
    mask = torch.cat([seen, (answers[:, 1:] != IGNORE_INDEX).to(seen)], dim=1)
    system, count, start = cache.config.system, given.shape[1], seen.shape[1]
    columns = torch.arange(count, device=given.device)
    by_token = system is not None and system.answers_by_token
    for first in range(0, count, 1 if by_token else count):
        stop = first + 1 if by_token else count
        inputs = {"input_ids": given[:, first:stop].clamp(min=0), **cache_argument(model, cache)}
        if not by_token:
            # Token by token, what comes after an answer makes no difference, and all rows attend together.
            inputs["attention_mask"] = mask[:, : start + stop]
        wanted_now, positions = wanted[:, first:stop], columns[: stop - first]
        losses = losses + losses_of_rows(model, wanted_now, positions, **inputs, use_cache=True)
    return losses


def _in_two(batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Split rows at their first label: (B, Tp) padded on the left and its mask, then the rest (B, A) and its labels."""
    if _is_one_answer(batch):
        answers = [row[row != IGNORE_INDEX] for row in batch["labels"]]
        rest = pad_sequence(answers, batch_first=True, padding_value=IGNORE_INDEX)
        return batch["prompt_ids"], batch["prompt_mask"], rest, rest
    firsts = (batch["labels"] != IGNORE_INDEX).int().argmax(dim=1).tolist()
    ends = batch["attention_mask"].sum(dim=1).tolist()
    prompts = [row[:first] for row, first in zip(batch["input_ids"], firsts, strict=True)]
    behind = [
        pad_sequence([row[first:end] for row, first, end in zip(batch[name], firsts, ends, strict=True)],
                     batch_first=True, padding_value=IGNORE_INDEX)
        for name in ("input_ids", "labels")
    ]  # fmt: skip
    return *left_padded(prompts), behind[0], behind[1]


def _is_one_answer(batch: Batch) -> bool:
    """Whether what has a loss is just what follows the prompt."""
    starts = [[start for start, _ in spans] for spans in batch.get("learnt", ())]
    return not starts or starts == [[length] for length in batch["prompt_length"]]
