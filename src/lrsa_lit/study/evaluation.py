"""Answers and losses of one model under one attention on one data set, question by question.

Dimensions: B prompts in a batch, T tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lrsa_lit.attention import Greedy, LRSAConfig, using
from lrsa_lit.data.collate import IGNORE_INDEX, collate, collate_training, targets, token_ids
from lrsa_lit.data.prompts import Example
from lrsa_lit.evaluation.metrics import exact_match, f1_score, recall
from lrsa_lit.models import uncompiled
from lrsa_lit.models.generation import stop_tokens
from lrsa_lit.models.head import losses_of_rows
from lrsa_lit.ops.sparse_attention import Selector


@dataclass
class Answers:
    """What a model made of the questions, in their order; a list is empty where it was not asked for.

    Attributes:
        loss: summed cross-entropy of each question's answer tokens.
        tokens: answer tokens of each question.
        text: generated answers.
        f1: of the generated answers, in [0, 1], as the others.
        em: exact match.
        recall: share of the references found.
    """

    loss: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    text: list[str] = field(default_factory=list)
    f1: list[float] = field(default_factory=list)
    em: list[float] = field(default_factory=list)
    recall: list[float] = field(default_factory=list)

    def placed(self, order: Sequence[int]) -> Answers:
        """What is here for the questions of some order, in the order of the questions."""
        lists = {name: sorted(zip(order, values, strict=True)) for name, values in vars(self).items() if values}
        return Answers(**{name: [value for _, value in pairs] for name, pairs in lists.items()})


def dense_rule(model: Any) -> LRSAConfig:
    """Dense attention as a rule: every layer is left dense, so that the same cache and decoder serve it."""
    return LRSAConfig(dense_layers=tuple(range(model.config.get_text_config().num_hidden_layers)))


@torch.no_grad()
def evaluate(
    model: Any,
    tokenizer: Any,
    examples: Sequence[Example],
    rule: LRSAConfig | None,
    *,
    max_new_tokens: int,
    batch_size: int = 8,
) -> Answers:
    """Teacher-forced loss and greedy answers.

    Args:
        model: a causal language model, in evaluation mode.
        tokenizer: its tokenizer.
        examples: the questions.
        rule: the attention; None is dense.
        max_new_tokens: most tokens of an answer; 0 generates none.
        batch_size: questions at a time for the loss, and most of the same length that are answered at a time.
    """
    found = Answers()
    with uncompiled(), using(model, dense_rule(model) if rule is None else rule):
        for start in range(0, len(examples), batch_size):
            batch = collate_training(examples[start : start + batch_size], tokenizer.pad_token_id)
            parts = (batch["input_ids"], targets(batch), batch["label_columns"])
            ids, wanted, columns = (part.to(model.device) for part in parts)
            found.loss += losses_of_rows(model, wanted, columns, input_ids=ids, use_cache=False).tolist()
            found.tokens += (wanted != IGNORE_INDEX).sum(dim=1).tolist()
        if not max_new_tokens:
            return found
        for answer, example in zip(
            _generate(model, tokenizer, examples, max_new_tokens, batch_size), examples, strict=True
        ):
            text = tokenizer.decode(answer, skip_special_tokens=True).strip()
            found.text.append(text)
            found.f1.append(f1_score(text, example["answers"], example["match"]))
            found.em.append(exact_match(text, example["answers"], example["match"]))
            found.recall.append(recall(text, example["answers"], example["match"]))
    return found


def _generate(
    model: Any, tokenizer: Any, examples: Sequence[Example], max_new_tokens: int, batch_size: int
) -> list[list[int]]:
    """The tokens of the answers, in the order of the examples."""
    prompts = [token_ids(example)[: example["prompt_length"]] for example in examples]
    longest = max(map(len, prompts))
    greedy = Greedy(model, stop_tokens(tokenizer), max_new_tokens=max_new_tokens, longest_prompt=longest)
    found: dict[int, list[int]] = {}
    for places in alike(list(map(len, prompts)), batch_size):
        batch = torch.stack([prompts[place] for place in places]).to(model.device)
        found |= zip(places, greedy(batch), strict=True)
    return [found[place] for place in range(len(examples))]


def alike(lengths: Sequence[int], most: int) -> list[list[int]]:
    """The positions of equal lengths together, at most ``most`` at a time, the short ones first."""
    groups: dict[int, list[int]] = {}
    for place in sorted(range(len(lengths)), key=lambda place: lengths[place]):
        groups.setdefault(lengths[place], []).append(place)
    return [group[start : start + most] for group in groups.values() for start in range(0, len(group), most)]


def survival(model: Any, tokenizer: Any, examples: Sequence[Example], rule: LRSAConfig | None) -> dict[str, Any] | None:
    """Which share of the supporting passages' and the answers' tokens is kept, over all layers and heads.

    Returns:
        ``gold`` and ``answer``, each None where no such token lies in a compressed partition, ``chance`` (K/L), and
        ``quarters``, the shares that are kept of the quarters of a partition; None where nothing is selected.
    """
    layers = model.config.get_text_config().num_hidden_layers
    if rule is None or not isinstance(rule.compressor, Selector) or len(rule.dense_layers) == layers:
        return None
    from lrsa_lit.analysis import metrics
    from lrsa_lit.analysis.capture import record

    batches = []
    for example in examples:
        batch = collate([example], tokenizer.pad_token_id)
        batches.append({name: part.to(model.device) if isinstance(part, Tensor) else part
                        for name, part in batch.items()})  # fmt: skip
    with using(model, rule):
        kept = record(model, batches, tokenizer, name="study")  # type: ignore[arg-type]
    found = {"gold": metrics.survival(kept, "gold"), "answer": metrics.survival(kept, "answer")}
    shares = {name: round(part.mean, 4) if part.tokens else None for name, part in found.items()}
    quarters = [
        None if math.isnan(share) else round(share, 4) for share in metrics.by_place(kept, 4).mean(axis=0).tolist()
    ]
    return {**shares, "chance": found["gold"].chance, "quarters": quarters}
