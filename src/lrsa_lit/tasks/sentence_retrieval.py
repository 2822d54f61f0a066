"""Train a causal language model to embed sentences in their context, near the questions that they help to answer (CPC).

Source: Liskavets et al., "Prompt Compression with Context-Aware Sentence Encoding for Fast and Improved LLM Inference",
arXiv 2409.01227.

Dimensions: B contexts, T tokens of the longest context, S most sentences of a context, n negatives per context, D width
of the model.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import lightning
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lrsa_lit.bounds import check_integers, check_setting, is_weight
from lrsa_lit.data.filters.sentence_filter import SelectionRule
from lrsa_lit.data.sentence_facts import FactsBatch, draw, supports_too
from lrsa_lit.errors import UserError
from lrsa_lit.models import Backbone
from lrsa_lit.models.checkpoint import check_weights, describe, trained_weights
from lrsa_lit.models.head import Head
from lrsa_lit.models.sentence_encoder import embeddings, remove_causal_mask, segment_means, states
from lrsa_lit.objectives.sentence_losses import contrastive_loss, masked, predicting
from lrsa_lit.strategies import gathered
from lrsa_lit.tasks.optimizers import check_length, optimizer_of
from lrsa_lit.tasks.sentence_recall import RecallMeter

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class SentenceRetrieval(lightning.LightningModule):
    """A base LLM without its causal mask, trained to embed sentences in their context near the questions they support.

    Training minimises two losses: a contrastive loss of each question's sentence among all drawn sentences of the
    batch, and the loss of masked tokens, each predicted from the position before it. Validation and test log
    ``val/recall_10`` …, the share of supporting sentences that are kept at a token budget, and their mean
    ``val/recall``. The same metrics for BM25 and for random sentences are ``val/bm25/…`` and ``val/random/…``. Outside
    a fit they also log the difference of the encoder's and BM25's mean recall per question, with its 95 % CI and
    p-value: ``test/over_bm25/10``, ``10_low``, ``10_high`` and ``10_p``.

    Args:
        backbone: the base LLM. With ``lora`` only adapters are trained, otherwise all weights.
        optimizer: the optimizer, created with the trainable parameters.
        lr_scheduler: the learning-rate schedule, stepped after each optimizer step; null keeps the rate constant.
        max_tokens: the most tokens per pass; longer contexts are read in chunks, also by the filter.
        negatives: number of sentences per context that do not support its question.
        scale: factor of the cosines in the contrastive loss.
        masked_share: probability that a token is masked.
        mask: a text of one token, which replaces masked tokens.
        masked_weight: weight of the loss of masked tokens; 0 leaves it out.
        budgets: shares of tokens at which the recall is measured.
        rule: how sentences are kept within a budget: strict or published, as in the filters.
    """

    def __init__(
        self,
        backbone: Backbone,
        optimizer: Callable[[Iterable[nn.Parameter]], Optimizer] = torch.optim.AdamW,
        lr_scheduler: Callable[[Optimizer], LRScheduler] | None = None,
        max_tokens: int = 2048,
        negatives: int = 2,
        scale: float = 20.0,
        masked_share: float = 0.8,
        mask: str = "_",
        masked_weight: float = 1.0,
        budgets: Sequence[float] = (0.1, 0.25),
        rule: SelectionRule = "strict",
    ) -> None:
        super().__init__()
        self.backbone, self.make_optimizer, self.make_scheduler = backbone, optimizer, lr_scheduler
        self.max_tokens, self.negatives, self.scale = max_tokens, negatives, scale
        self.masked_share, self.mask, self.masked_weight = masked_share, mask, masked_weight
        check_integers(self, 1, "max_tokens")
        check_integers(self, 0, "negatives")
        for name in ("scale", "masked_weight"):
            check_setting(name, getattr(self, name), is_weight(getattr(self, name)), "a finite number >= 0")
        check_setting("masked_share", masked_share, is_weight(masked_share) and 0 < masked_share < 1, "in (0, 1)")
        self.meter = RecallMeter(budgets, rule)
        self.lines: list[dict[str, Any]] = []
        # Checkpoints of adapters leave the frozen base out; it is loaded from its source.
        self.strict_loading = backbone.lora is None
        self.model: Any = None

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The backbone's tokenizer."""
        return self.backbone.tokenizer

    @property
    def mask_id(self) -> int:
        """The id of the mask token; a UserError if ``mask`` is not one token."""
        ids = self.tokenizer.encode(self.mask, add_special_tokens=False)
        if len(ids) != 1:
            raise UserError("mask", self.mask, f"a text of one token of {self.backbone.name}; it has {len(ids)}")
        return int(ids[0])

    def configure_model(self) -> None:
        """Load the base LLM and remove its causal mask; done only once."""
        if self.model is None:
            self.model = self.backbone.build()
            remove_causal_mask(self.model)

    def configure_optimizers(self) -> Any:
        """The optimizer over the trainable parameters, and its schedule in steps."""
        parameters = [parameter for parameter in self.parameters() if parameter.requires_grad]
        optimizer, scheduler = optimizer_of(self.make_optimizer, self.make_scheduler, parameters)
        if scheduler is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def check_optimizer(self) -> None:
        """Raise a UserError if optimizer or schedule cannot be created, before anything slow starts."""
        optimizer_of(self.make_optimizer, self.make_scheduler, [nn.Parameter(torch.zeros(1, 1))])

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint with other weights, of a model that answers, or with a schedule of another length."""
        check_weights(checkpoint, trained_weights(self.backbone, self), encodes=True)
        if self.trainer.training:
            check_length(checkpoint, self.trainer.max_steps)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep only trained weights, and add a description."""
        checkpoint["state_dict"] = trained_weights(self.backbone, self, checkpoint["state_dict"])
        describe(checkpoint, self.backbone, None, encoder={"max_tokens": self.max_tokens})

    def training_step(self, batch: FactsBatch, batch_idx: int) -> Tensor:
        """The contrastive loss of the batch plus the weighted loss of its masked tokens."""
        contrast = self.contrastive(batch)
        self.log("train/loss/contrastive", contrast.detach(), batch_size=len(batch["facts"]))
        loss = contrast
        if self.masked_weight:
            of_masked = self.masked_tokens(batch)
            self.log("train/loss/masked", of_masked.detach(), batch_size=len(batch["facts"]))
            loss = loss + self.masked_weight * of_masked
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=len(batch["facts"]))
        self.log("train/lr", self.trainer.optimizers[0].param_groups[0]["lr"])
        return loss

    def contrastive(self, batch: FactsBatch) -> Tensor:
        """The contrastive loss of sentences drawn with the run's random numbers."""
        # Seeded from the run's generator, whose state a resumed run restores.
        rng = random.Random(int(torch.randint(2**62, ())))
        drawn = [draw(facts, self.negatives, rng) for facts in batch["facts"]]
        candidates = [(row, positive) for row, (positive, _) in enumerate(drawn)]
        candidates += [(row, number) for row, (_, negatives) in enumerate(drawn) for number in negatives]
        others = torch.tensor(supports_too(batch["facts"], candidates), device=self.device)
        count = max(len(facts.sentences) for facts in batch["facts"])
        means = segment_means(states(self.model, batch["input_ids"], batch["mask"]), batch["segments"], count)
        rows, numbers = torch.tensor(candidates, device=self.device).unbind(dim=1)
        with torch.no_grad():
            asked = states(self.model, batch["question_ids"], batch["question_mask"])
            questions = segment_means(asked, batch["question_segments"], 1)[:, 0]
        return contrastive_loss(questions, means[rows, numbers], self.scale, others)

    def masked_tokens(self, batch: FactsBatch) -> Tensor:
        """The mean cross-entropy of tokens masked with the run's random numbers."""
        read, labels = masked(batch["input_ids"], batch["mask"], self.mask_id, self.masked_share)
        where, wanted = predicting(labels)
        hidden = states(self.model, read, batch["mask"])[where]
        head = Head(self.model.get_output_embeddings(), self.model.config.get_text_config())
        return head.cross_entropy(hidden, wanted) / max(len(wanted), 1)

    def validation_step(self, batch: FactsBatch, batch_idx: int) -> dict[str, Any]:
        """Measure recall: the ``lines`` of :meth:`RecallMeter.update` for each question."""
        lines = []
        for facts, scores, repeated in zip(batch["facts"], self.similarities(batch), batch["repeated"], strict=True):
            if not repeated:
                lines.append(self.meter.update(facts, scores))
        self.lines += lines
        return {"lines": lines}

    test_step = validation_step

    def similarities(self, batch: FactsBatch) -> list[list[float]]:
        """The cosine between each sentence and the question of its context."""
        contexts = [facts.sentences for facts in batch["facts"]]
        questions = embeddings(self.model, [[facts.question] for facts in batch["facts"]], self.max_tokens)
        found = embeddings(self.model, contexts, self.max_tokens)
        return [(each @ question[0]).tolist() for each, question in zip(found, questions, strict=True)]

    def on_validation_epoch_start(self) -> None:
        """Start the sums of an evaluation."""
        self.meter.sums.clear()
        self.lines.clear()

    def on_validation_epoch_end(self) -> None:
        """Log the recalls of an evaluation."""
        found = self.meter.recalls(gathered(dict(self.meter.sums)))
        for name, value in found.items():
            self.log(f"{self._split}/{name}", float(value), prog_bar=name == "recall")
        if self.trainer.state.fn != "fit":
            lines = [line for of_process in gathered(self.lines) for line in of_process]
            for key, found_more in self.meter.over_bm25(lines).items():
                estimate = found_more.difference
                values = {"": estimate.value, "_low": estimate.low, "_high": estimate.high, "_p": found_more.p_value}
                self.log_dict({f"{self._split}/over_bm25/{key}{end}": value for end, value in values.items()})

    on_test_epoch_start, on_test_epoch_end = on_validation_epoch_start, on_validation_epoch_end

    @property
    def _split(self) -> Literal["val", "test"]:
        return "test" if self.trainer.testing else "val"
