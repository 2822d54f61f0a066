"""A callback that records, beside the answers, how much of the evidence each attention keeps."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch import Callback, LightningModule, Trainer

from lrsa_lit.analysis import metrics
from lrsa_lit.analysis.capture import record, unrecordable
from lrsa_lit.attention import using
from lrsa_lit.callbacks import AnswerWriter
from lrsa_lit.errors import UserError
from lrsa_lit.run_labels import OWN
from lrsa_lit.strategies import gathered, shards_weights

if TYPE_CHECKING:
    from lrsa_lit.analysis.record import SelectionRecord
    from lrsa_lit.attention import LRSAConfig
    from lrsa_lit.data.collate import Batch
    from lrsa_lit.tasks import LongContextQA


class EvidenceSurvival(Callback):
    """Add the kept share of the evidence to the JSON file beside the answers; only in tests and ``lrsa validate``.

    The file's ``survival`` has for each attention and data set: the kept share, over all layers and heads, of the
    tokens of supporting passages (``gold``) and of the answers in them (``answer``), null if none of these tokens is in
    a compressed partition; ``chance`` (K/L); and ``quarters``, the kept share of each quarter of a partition. It is
    null for an attention without selection.

    Args:
        questions: number of questions per data set to analyse, from the first.

    Raises:
        UserError: fewer than one.
    """

    only_validates = True

    def __init__(self, questions: int = 16) -> None:
        if questions < 1:
            raise UserError("EvidenceSurvival.questions", questions, "an integer >= 1")
        self.questions = questions
        self._first: dict[str, dict[int, Any]] = {}
        """For each data set: questions, by position, as batches of one row without padding."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Reset the state.

        Raises:
            UserError: the weights are sharded; this is not supported because devices may have different numbers of
                questions.
        """
        self._first = {}
        if shards_weights(trainer.strategy):
            raise UserError("EvidenceSurvival", reason="it needs the whole model on each device")

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, *_: Any, **__: Any
    ) -> None:
        """Keep the first questions of each data set."""
        for row, source in enumerate(batch["source"]):
            kept = self._first.setdefault(source, {})
            if len(kept) < self.questions and not batch["repeated"][row]:
                part = slice(row, row + 1)
                prompt = slice(-batch["prompt_length"][row], None)
                kept[batch["position"][row]] = {
                    "id": batch["id"][part],
                    "prompt_ids": batch["prompt_ids"][part, prompt].cpu(),
                    "prompt_mask": batch["prompt_mask"][part, prompt].cpu(),
                    "gold_spans": batch["gold_spans"][part],
                    "answer_spans": batch["answer_spans"][part],
                }

    def on_validation_batch_end(self, trainer: Trainer, *arguments: Any, **keywords: Any) -> None:
        """Do the same in ``lrsa validate``, but not in a fit."""
        if trainer.state.fn == "validate":
            self.on_test_batch_end(trainer, *arguments, **keywords)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Analyse the questions under each attention, and pass the results to the writers of answers."""
        task: LongContextQA = pl_module  # type: ignore[assignment]
        of_all: dict[str, list[int]] = {}
        for process in gathered({source: list(kept) for source, kept in self._first.items()}):
            for source, positions in process.items():
                of_all[source] = sorted([*of_all.get(source, []), *positions])[: self.questions]
        with trainer.precision_plugin.forward_context():
            survival = {
                name or OWN: {source: self._found(task, rule, source, chosen) for source, chosen in of_all.items()}
                for name, rule in task.attentions.items()
            }
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, AnswerWriter):
                callback.more["survival"] = survival

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Do the same in ``lrsa validate``, but not in a fit."""
        if trainer.state.fn == "validate":
            self.on_test_epoch_end(trainer, pl_module)

    def _found(self, task: LongContextQA, rule: LRSAConfig | None, source: str, chosen: list[int]) -> Any:
        """The results of a rule over the questions of all processes; None if the rule selects nothing."""
        layers = task.model.config.get_text_config().num_hidden_layers
        if rule is None or unrecordable(rule, layers) is not None:
            return None
        own = [question for position, question in self._first.get(source, {}).items() if position in chosen]
        found: SelectionRecord | None = None
        if own:
            batches = move_data_to_device(own, task.device)
            with using(task.model, rule):
                found = record(task.model, batches, task.tokenizer, name=task.backbone.name)
        parts = [part for part in gathered(found) if part is not None]
        kept = dataclasses.replace(parts[0], samples=tuple(sample for part in parts for sample in part.samples))
        gold, answer = metrics.survival(kept, "gold"), metrics.survival(kept, "answer")
        quarters = [_rounded(share) for share in metrics.by_place(kept, 4).mean(axis=0).tolist()]
        shares = {"gold": _rounded(gold.mean), "answer": _rounded(answer.mean)}
        return {**shares, "chance": gold.chance, "quarters": quarters}


def _rounded(share: float) -> float | None:
    return None if math.isnan(share) else round(share, 4)
