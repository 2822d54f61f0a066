"""A callback that says, beside the answers, how much of the evidence for them each attention keeps."""

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
    """Add what is kept of the evidence to the file beside the answers of a test, or of a validation by itself.

    ``survival`` there has, for each attention and each data set, which share is kept, over all layers and heads, of the
    tokens of supporting passages (``gold``) and of the answers in them (``answer``), null where no such token lies in a
    compressed partition; ``chance`` (K/L); and ``quarters``, the shares that are kept of the quarters of a partition.
    An attention that selects nothing has null in place of all that.

    Args:
        questions: how many of each data set are looked at, the first ones.

    Raises:
        UserError: fewer than one.
    """

    only_validates = True

    def __init__(self, questions: int = 16) -> None:
        if questions < 1:
            raise UserError("EvidenceSurvival.questions", questions, "an integer >= 1")
        self.questions = questions
        self._first: dict[str, dict[int, Any]] = {}
        """Of each data set, by their positions, questions as batches of one row without pads."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Begin anew.

        Raises:
            UserError: the weights are sharded: not all devices look at as many questions.
        """
        self._first = {}
        if shards_weights(trainer.strategy):
            raise UserError("EvidenceSurvival", reason="it needs the whole model on each device")

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, *_: Any, **__: Any
    ) -> None:
        """Put the first questions aside."""
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
        """The same for a validation, unless it is one of a fit."""
        if trainer.state.fn == "validate":
            self.on_test_batch_end(trainer, *arguments, **keywords)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at the questions under each attention, and hand over what is found to the writers of answers."""
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
        """The same for a validation, unless it is one of a fit."""
        if trainer.state.fn == "validate":
            self.on_test_epoch_end(trainer, pl_module)

    def _found(self, task: LongContextQA, rule: LRSAConfig | None, source: str, chosen: list[int]) -> Any:
        """What the questions of all processes show of a rule; None where it selects nothing."""
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
