"""Judge rewritten passages by whether a model still answers the question.

Dimensions: B records.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from lrsa_lit.data.collate import IGNORE_INDEX, Batch, collate, targets
from lrsa_lit.data.preferences import Candidate
from lrsa_lit.data.prompts import Prompt, TooLong, encode
from lrsa_lit.data.records import Passage, QARecord
from lrsa_lit.evaluation.answer_scores import f1_score
from lrsa_lit.models import uncompiled
from lrsa_lit.models.checkpoint import Trained
from lrsa_lit.models.head import losses_of_rows
from lrsa_lit.tasks.dense_model import DenseModel

ANSWERED = 0.5
"""The least F1 with which a question counts as answered."""
HARMLESS = 0.1
"""How much the answer's loss per token may rise (nats) if the question is not answered with the original passage."""


class Verdict(NamedTuple):
    """A judge's result for a question: the F1 of its answer, and the reference answer's mean loss per token (nats)."""

    f1: float
    loss: float

    def succeeds(self, whole: Verdict) -> bool:
        """Whether a rewriting succeeds, given the verdict ``whole`` with the original passage."""
        answered = self.f1 >= ANSWERED
        return answered or (whole.f1 < ANSWERED and self.loss - whole.loss < HARMLESS)


class PreferenceJudge:
    """A model that answers questions, with dense attention.

    Args:
        trained: the model, which is loaded here.
        device: the device to run on.
        max_tokens: the most tokens of a question with its context and answer; limited by the model's positions.
        batch_size: questions per batch.
        max_new_tokens: the most tokens of an answer.
    """

    def __init__(
        self, trained: Trained, device: torch.device, max_tokens: int, batch_size: int = 1, max_new_tokens: int = 32
    ) -> None:
        self._asked = DenseModel(trained, device)
        positions = getattr(trained.backbone.config, "max_position_embeddings", None)
        self._most = max_tokens if positions is None else min(max_tokens, positions - max_new_tokens)
        self._at_once, self._longest = batch_size, max_new_tokens

    def verdicts(self, records: Sequence[QARecord], prompt: Prompt) -> list[Verdict | None]:
        """A verdict for each record; None if a record does not fit into ``max_tokens``."""
        tokenizer = self._asked.tokenizer
        examples = [encode(record, tokenizer, self._most, prompt) for record in records]
        fitting = [example for example in examples if not isinstance(example, TooLong)]
        found: list[Verdict] = []
        for first in range(0, len(fitting), self._at_once):
            batch = collate(fitting[first : first + self._at_once], int(tokenizer.pad_token_id))
            losses, tokens = self._losses(batch)
            answers = self._asked.answers(batch["prompt_ids"], batch["prompt_mask"], self._longest)
            rows = zip(answers, batch["answers"], batch["match"], (losses / tokens).tolist(), strict=True)
            found += [Verdict(f1_score(text, wanted, match), loss) for text, wanted, match, loss in rows]
        of_fitting = iter(found)
        return [None if isinstance(example, TooLong) else next(of_fitting) for example in examples]

    def _losses(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The summed loss and the number of tokens of each reference answer, (B,)."""
        device, wanted = self._asked.device, targets(batch)
        ids, columns = batch["input_ids"].to(device), batch["label_columns"].to(device)
        with uncompiled():
            losses = losses_of_rows(self._asked.model, wanted.to(device), columns, input_ids=ids, use_cache=False)
        return losses.cpu(), (wanted != IGNORE_INDEX).sum(dim=1)

    def judged(
        self, record: QARecord, prompt: Prompt, place: int, texts: Mapping[str, str]
    ) -> list[tuple[Candidate, Verdict]] | None:
        """Judge rewritings of one of a record's passages; each one replaces the passage.

        Args:
            record: a question with its context.
            prompt: the prompt's form.
            place: the passage's index.
            texts: the rewritings, by the name of their method; of equal ones only the first is judged.

        Returns:
            The rewritings with which the question fits into ``max_tokens``, with their verdicts; None if it does not
            fit with the original passage.
        """
        passage = record.passages[place]
        made = {text: by for by, text in reversed(list(texts.items()))}
        others = [text for text in made if text != passage.text]
        verdicts = self.verdicts([_with_text(record, place, text) for text in (passage.text, *others)], prompt)
        of_text = dict(zip((passage.text, *others), verdicts, strict=True))
        if (whole := of_text[passage.text]) is None:
            return None
        own = ((by, text, of_text[text]) for by, text in texts.items() if made[text] == by)
        judged = ((by, text, verdict) for by, text, verdict in own if verdict is not None)
        return [(Candidate(by, text, verdict.succeeds(whole)), verdict) for by, text, verdict in judged]


def _with_text(record: QARecord, place: int, text: str) -> QARecord:
    passages = list(record.passages)
    passages[place] = Passage(passages[place].title, text)
    return replace(record, passages=tuple(passages))
