"""Fine-tune and evaluate a causal language model on long-context question answering.

Dimensions: B examples, T tokens of the longest example, Tp tokens of the longest prompt, A answer tokens.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Literal

import lightning
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lrsa_lit.attention import Greedy, LRSAConfig, disable, enable, enabled_config, using
from lrsa_lit.attention.attached import warn_of_others
from lrsa_lit.chat_template import with_arguments
from lrsa_lit.data.collate import IGNORE_INDEX, Batch, TrainBatch, targets
from lrsa_lit.data.loaders import TrainerSettings
from lrsa_lit.data.module import QADataModule
from lrsa_lit.errors import UserError, under
from lrsa_lit.evaluation.answers import Answers
from lrsa_lit.lightning_internals import trainer_of
from lrsa_lit.models import Backbone, uncompiled
from lrsa_lit.models.checkpoint import Trained, check_weights, describe, rule_of, trained_weights
from lrsa_lit.models.generation import stop_tokens
from lrsa_lit.models.head import losses_of_rows
from lrsa_lit.objectives import AnswerLoss, Objective, summed_losses
from lrsa_lit.objectives.positions import Positions
from lrsa_lit.objectives.teachers import Teacher, check_own_teachers
from lrsa_lit.strategies import context_of, gathered, is_sharded, shard, whole_mesh
from lrsa_lit.tasks.answer_meter import AnswerMeter
from lrsa_lit.tasks.attentions import check_layers, check_names, check_train, derived, evaluated, needs_cache, of_system
from lrsa_lit.tasks.digests import Digests
from lrsa_lit.tasks.head_gates import HeadGates
from lrsa_lit.tasks.losses_behind_prompts import LossesBehind, losses_behind_prompts
from lrsa_lit.tasks.measures import measured
from lrsa_lit.tasks.optimizers import check_length, optimizer_of
from lrsa_lit.tasks.prediction_lines import prediction_lines
from lrsa_lit.tasks.shared_batch import added_up, check_shareable, inputs_of, long_enough, shared_rows
from lrsa_lit.tasks.soco import SoCo
from lrsa_lit.tasks.start import begun
from lrsa_lit.tasks.top_k import TopKSchedule, check_schedule
from lrsa_lit.tasks.trained_part import TrainedPart

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class LongContextQA(lightning.LightningModule):
    """A base LLM with lag-relative sparse attention, trained to answer questions over long contexts.

    Training minimises the objective. Validation and test generate answers greedily with the compressed cache. They log
    ``val/loss`` (of the answers' tokens), ``val/f1``, ``val/em`` and ``val/recall`` for the run's rule, and the same as
    ``val/NAME/…`` for each further attention, each data set of a mixture and each task of a data set.

    Args:
        backbone: the base LLM.
        lrsa: the rule for training and evaluation.
        objective: the training objective: Distillation, LanguageModelLoss … or a Sum of several; null means AnswerLoss.
        start_from: a fit's checkpoint (.ckpt) or a folder of adapters, whose weights training starts from, at step 0
            with a new optimizer; null starts from the backbone. Ignored with ``--ckpt_path``, except for head_gates.
        optimizer: the optimizer, created with the trainable parameters.
        lr_scheduler: the learning-rate schedule, stepped after each optimizer step; null keeps the rate constant.
        train_attention: changes to the rule in training ({} for none, {top_k: 64} for another K); null trains dense.
        train_top_k: a schedule of K over training steps: linear (AnnealedTopK) or random (SampledTopK); null keeps the
            training attention's K.
        head_gates: train only gates of heads, and evaluate DuoAttention with them; null trains weights.
        spectra: train only scores of the singular values of keys and values (SoCo), and evaluate with the kept
            components; null trains weights.
        digests: train vectors that replace the context, with a frozen LLM (IC-Former); null trains weights.
        evaluate: further attentions to evaluate with the same weights, by name: {dense: null, k16: {top_k: 16}}.
            ``dense_layers: {only: 30}`` expands to 30 attentions NAME-0 to NAME-29, each with only that layer dense;
            {only: 30, beside: [18]} also keeps layer 18 dense; {all_but: 30} makes all layers but one dense.
        max_new_tokens: the most tokens of a generated answer.
        generate_answers: whether validation and test generate answers; if false, they compute only losses.
        template_arguments: arguments of the model's chat template, such as {enable_thinking: false}.
    """

    def __init__(
        self,
        backbone: Backbone,
        lrsa: LRSAConfig = LRSAConfig(),  # noqa: B008 - frozen
        optimizer: Callable[[Iterable[nn.Parameter]], Optimizer] = torch.optim.AdamW,
        lr_scheduler: Callable[[Optimizer], LRScheduler] | None = None,
        train_attention: dict[str, Any] | None = {},  # noqa: B006 - read only
        train_top_k: TopKSchedule | None = None,
        objective: Objective | None = None,
        start_from: str | None = None,
        head_gates: HeadGates | None = None,
        spectra: SoCo | None = None,
        digests: Digests | None = None,
        evaluate: dict[str, dict[str, Any] | None] = {},  # noqa: B006 - read only
        max_new_tokens: int = 32,
        generate_answers: bool = True,
        template_arguments: dict[str, Any] = {},  # noqa: B006 - read only
    ) -> None:
        super().__init__()
        if max_new_tokens < 1:
            raise UserError("max_new_tokens", max_new_tokens, "an integer >= 1")
        self.backbone, self.lrsa = backbone, lrsa
        self.make_optimizer = optimizer
        self.make_scheduler = lr_scheduler
        self.attentions = evaluated(lrsa, evaluate)
        self.train_config = derived("train_attention", lrsa, train_attention)
        self.train_top_k = train_top_k
        check_schedule(train_top_k, self.train_config)
        self.objective = AnswerLoss() if objective is None else objective
        if self.train_config is None:
            check_own_teachers(self._teachers, beside=spectra is not None or backbone.lora is not None)
        self.start_from = start_from
        self.head_gates, self.spectra, self.digests = head_gates, spectra, digests
        if spectra is not None:
            spectra.begin(backbone, {"head_gates": head_gates, "digests": digests})
        others = {"objective": objective, "train_attention": train_attention, "train_top_k": train_top_k}
        if head_gates is not None:
            self.lrsa = self.attentions[""] = head_gates.begin(backbone, lrsa, others)
            self.train_config, self.objective = head_gates.attention, head_gates.objective
        if digests is not None:
            told = {**others, "head_gates": head_gates, "generate_answers": generate_answers}
            self.lrsa = self.attentions[""] = digests.begin(backbone, lrsa, told)
            self.train_config = None
        self.generate_answers = generate_answers
        self.meters = {name: AnswerMeter(generated=generate_answers) for name in self.attentions}
        self.max_new_tokens = max_new_tokens
        self.template_arguments = template_arguments
        self._greedy: dict[LRSAConfig, Greedy] = {}
        # Checkpoints of adapters or gates leave the frozen base out; it is loaded from its source.
        self.strict_loading = backbone.lora is None and head_gates is None and digests is None
        self.logs_measures = True  # except in a fit, whose validations would log the same values repeatedly
        self.model: Any = None

    @functools.cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The backbone's tokenizer, with the template arguments."""
        return with_arguments(self.backbone.tokenizer, self.template_arguments)

    def check_layers(self, count: int, heads: int | None = None) -> None:
        """Raise a UserError if a rule's layers or key-value heads do not exist in the model."""
        rules = {f"evaluate.{name}" if name else "lrsa": rule for name, rule in self.attentions.items()}
        check_layers(rules | {"train_attention": self.train_config}, count, heads)

    def check_training(self) -> None:
        """Refuse a system that models cannot be trained with."""
        check_train("train_attention", self.train_config)

    @property
    def part(self) -> TrainedPart | None:
        """The part that is trained instead of weights, or None."""
        return self.head_gates or self.spectra or self.digests

    def check_objective(self, max_tokens: int, steps: int) -> None:
        """Check the objective, its teachers and the trained part.

        Raises:
            UserError: it needs more tokens or layers, a teacher does not fit, or ``steps`` are too few for the part.
        """
        if self.part is not None:
            self.part.check(max_tokens, steps)
        with under("objective"):
            self.objective.check(max_tokens, self.backbone.config.num_hidden_layers)
            for teacher in self._teachers:
                teacher.check(self.tokenizer)

    def open_teachers(self, data: QADataModule) -> None:
        """Open the teachers' caches for the training split; a UserError if one is missing."""
        examples = data.training_fingerprint
        with under("objective"):
            for teacher in self._teachers:
                teacher.open(examples, self.backbone.config.vocab_size)

    @property
    def _teachers(self) -> list[Teacher]:
        return [term.teacher for term in self.objective.terms if term.teacher is not None]

    def setup(self, stage: str) -> None:
        """In a fit, check what cannot be trained, and open the teachers' caches, once the data is prepared."""
        data = getattr(self.trainer, "datamodule", None)
        if stage == "fit":
            self.check_training()
            if context_of(self.device_mesh) is not None:
                with under("trainer.strategy.init_args"):
                    check_shareable(self.train_config, self.objective, self.backbone.config)
            if isinstance(data, QADataModule):
                self.open_teachers(data)

    def start(self) -> Trained:
        """The model that a run starts with, not loaded yet. Raises as :func:`begun`."""
        return begun(self.start_from, self.backbone, self.digests)

    def configure_model(self) -> None:
        """Load the base LLM and enable the training attention; done only once."""
        if self.model is not None:
            return
        self.model = self.start().build()
        if self.part is not None:
            self.part.install(self.model)
        enable(self.model, self.train_config or self.lrsa)
        if self.train_config is None:
            disable(self.model)
        if self.device_mesh is not None:
            mixed = torch.bfloat16 if self.trainer.precision == "bf16-mixed" else None
            shard(self.model, whole_mesh(self.device_mesh), dtype=mixed)

    def configure_optimizers(self) -> Any:
        """The optimizer over the trainable parameters, and its schedule in steps."""
        optimizer, scheduler = self._optimizer([p for p in self.parameters() if p.requires_grad])
        if scheduler is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def check_optimizer(self) -> None:
        """Raise a UserError if optimizer or schedule cannot be created, before anything slow starts."""
        self._optimizer([nn.Parameter(torch.zeros(1, 1))])

    def _optimizer(self, parameters: list[nn.Parameter]) -> tuple[Any, Any]:
        return optimizer_of(self.make_optimizer, self.make_scheduler, parameters, self.part)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint with other trained weights or with a schedule of another length."""
        check_weights(checkpoint, trained_weights(self.backbone, self))
        if self.digests is not None:
            self.digests.check_base(checkpoint)
        if not self.trainer.training:
            warn_of_others(rule_of(checkpoint), [rule for rule in self.attentions.values() if rule is not None])
        if self.trainer.training:
            check_length(checkpoint, self.trainer.max_steps)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep only trained weights (adapters, gates, digests, or all), and add a description."""
        checkpoint["state_dict"] = trained_weights(self.backbone, self, checkpoint["state_dict"])
        # With gates, no weights were trained under any rule.
        rule = None if self.train_config is None or self.head_gates is not None else self.train_config.to_dict()
        spectra = None if self.spectra is None else self.spectra.described(self.trainer.max_steps)
        digests = None if self.digests is None else self.digests.described
        describe(checkpoint, self.backbone, rule, self.template_arguments, spectra, digests=digests)

    def summed_losses(self, batch: TrainBatch, step: int, model: Any = None) -> Tensor:
        """Each of the objective's terms summed over the batch, at least float32, without waiting for a GPU.

        If devices share rows, the sums are over this device's tokens. Only the positions that have a loss get logits,
        not the whole context. ``model`` can replace the trained model.
        """
        config = self.train_config or self.lrsa
        batch = long_enough(batch, self.device_mesh, config)
        shared = shared_rows(batch, self.device_mesh, config)
        positions = Positions(batch, torch.initial_seed(), step, shared)
        return summed_losses(model or self.model, self.objective.terms, positions, inputs_of(batch, shared))

    def training_step(self, batch: TrainBatch, batch_idx: int) -> Tensor:
        """The batch's part of the step's objective, with the training attention.

        Each term is a mean over all positions of the step, however these are spread over batches and devices; a mean of
        the batches' means would favour short answers.
        """
        together = batch["boundaries"] is not None or context_of(self.device_mesh) is not None
        if together and self.train_config is None and enabled_config(self.model) is None:
            # Packed sequences must not see each other, for which the model's own attention would need a T x T mask. It
            # also cannot handle rows that devices share.
            enable(self.model, self._dense)
        if self.train_config is not None and self.train_top_k is not None:
            top_k = self.train_top_k(torch.initial_seed(), self.trainer.global_step, self.train_config)
            enable(self.model, self.train_config.replace(top_k=top_k))
            self.log("train/top_k", float(top_k))
        model, step = self.model, self.trainer.global_step
        if self.digests is not None:
            model, batch = self.digests.read(model, batch, torch.initial_seed(), step)
        terms, sums = self.objective.terms, self.summed_losses(batch, step, model)
        shown, loss = torch.zeros_like(sums[0]), torch.zeros_like(sums[0])
        for term, total, of_all in zip(terms, sums, added_up(sums, self.device_mesh), strict=True):
            here, of_step = (sum(map(term.count, batch[name])) for name in ("sizes", "step_sizes"))
            mean = of_all / here
            if len(terms) > 1:
                self.log(f"train/loss/{term.name}", mean, batch_size=len(batch["id"]))
            shown += term.weight * mean
            loss = loss + term.weight / of_step * total
        if self.part is not None:
            loss, shown, of_part = self.part.penalised(loss, shown, batch, step, self.trainer.max_steps)
            self.log_dict(of_part, batch_size=len(batch["id"]))
        self.log("train/loss", shown, prog_bar=True, batch_size=len(batch["id"]))
        self.log("train/lr", self.trainer.optimizers[0].param_groups[0]["lr"])
        # Cancels two divisions: Lightning divides by the batches of a step, and the strategy by the devices.
        return loss * self.trainer.accumulate_grad_batches * TrainerSettings.of(self.trainer).devices

    def validation_step(self, batch: Batch, batch_idx: int) -> dict[str, Answers]:
        """Answer losses and generated answers with each attention, by its name; "" is the run's own rule."""
        found = {}
        for name, rule in self.attentions.items():
            with under(f"evaluate.{name}") if name else contextlib.nullcontext(), of_system(rule):
                behind = LossesBehind.of(self.model, batch, rule) if self.generate_answers else None
                texts = self.generate(batch, rule, behind)[0] if self.generate_answers else None
                losses, tokens = self.losses(batch, rule) if behind is None else behind.found
            found[name] = Answers(losses.tolist(), tokens.tolist(), texts)
            took = self._answering(rule or self._dense).usage if texts else None
            self.meters[name].update(found[name], batch, took)
        return found

    test_step = validation_step

    def predict_step(self, batch: Batch, batch_idx: int) -> list[dict[str, Any]]:
        """The answers with the run's own rule, as dicts for JSON lines."""
        texts, lengths = self.generate(batch, self.lrsa)
        return prediction_lines(batch, texts, lengths, self.lrsa)

    @torch.no_grad()
    def losses(self, batch: Batch, rule: LRSAConfig | None) -> tuple[Tensor, Tensor]:
        """The summed loss and the number of tokens of each answer (B,), with a rule; None means dense attention."""
        with using(self.model, rule), uncompiled():
            model, batch = self._given(batch, rule)
            if needs_cache(rule):
                losses = losses_behind_prompts(model, batch, self.tokenizer)
            else:
                ids, columns = batch["input_ids"], batch["label_columns"]
                losses = losses_of_rows(model, targets(batch), columns, input_ids=ids, use_cache=False)
        return losses, (targets(batch) != IGNORE_INDEX).sum(dim=1)

    def generate(
        self, batch: Batch, rule: LRSAConfig | None, behind: LossesBehind | None = None
    ) -> tuple[list[str], list[int]]:
        """Greedy answers to prompts (B, Tp), up to a special token, and their lengths in tokens; None means dense."""
        rule = rule or self._dense
        with using(self.model, rule), uncompiled(), torch.no_grad():
            answering = self._answering(rule)
            answering.model, given = self._given(batch, rule)
            ends = given.get("first_turn"), given.get("context_length")
            answers = answering(given["prompt_ids"], given["prompt_mask"], *ends, behind)
            if self.digests is not None and given is not batch and answering.usage:
                answering.usage = self.digests.usage(answering.usage, batch)
        texts = self.tokenizer.batch_decode(answers, skip_special_tokens=True)
        return [text.strip() for text in texts], list(map(len, answers))

    def _given(self, batch: Batch, rule: LRSAConfig | None) -> tuple[Any, Batch]:
        """The model and the batch that it reads with a rule; with digests if this is the run's own rule."""
        if self.digests is None:
            return self.model, batch
        return self.digests.evaluated(self.model, batch, own=rule == self.lrsa)

    @property
    def _dense(self) -> LRSAConfig:
        return self.lrsa.replace(dense_layers=tuple(range(self.model.config.get_text_config().num_hidden_layers)))

    def _answering(self, rule: LRSAConfig) -> Greedy:
        """The greedy decoder for a rule; it reuses its memory until the evaluation ends."""
        if rule not in self._greedy:
            data = getattr(trainer_of(self), "datamodule", None)
            self._greedy[rule] = Greedy(
                self.model,
                stop_tokens(self.tokenizer),
                max_new_tokens=self.max_new_tokens,
                longest_prompt=0 if data is None else data.max_tokens,
                # All devices of a sharded model must continue until the last one has finished its answers.
                synced=is_sharded(self.model),
                encode=functools.partial(self.tokenizer.encode, add_special_tokens=False),
            )
        return self._greedy[rule]

    def on_validation_epoch_start(self) -> None:
        """Start the metrics of an evaluation."""
        # Decoders of a failed evaluation: weights may have changed, and inference-mode tensors cannot be reused.
        self._greedy.clear()
        self.on_predict_epoch_start()
        data = getattr(self.trainer, "datamodule", None)
        groups = [] if data is None else data.groups(self._split)
        texts = {group for group in ("", *groups) if data is not None and data.score_of(group) == "loss"}
        check_names(self.attentions, groups)
        for meter in self.meters.values():
            meter.reset(groups, texts)

    def on_validation_epoch_end(self) -> None:
        """Log the metrics of an evaluation."""
        shown = "f1" if self.generate_answers else "loss"
        processes = gathered({name: meter.sums for name, meter in self.meters.items()})
        for attention, meter in self.meters.items():
            prefix = f"{self._split}/{attention}/" if attention else f"{self._split}/"
            for name, value in meter.means([process[attention] for process in processes]).items():
                self.log(f"{prefix}{name}", value, prog_bar=(attention, name) == ("", shown))
        if self.logs_measures and self.trainer.state.fn != "fit":
            self.log_dict(measured(self.attentions, self.meters, self.backbone.config.num_hidden_layers, self._split))
        self._greedy.clear()
        self.on_predict_epoch_end()

    on_test_epoch_start, on_test_epoch_end = on_validation_epoch_start, on_validation_epoch_end

    def on_predict_epoch_start(self) -> None:
        """Evaluate with the current gates or spectra, if there are any."""
        if self.part is not None:
            self.lrsa = self.attentions[""] = self.part.served(self.lrsa)

    def on_predict_epoch_end(self) -> None:
        """Continue training the part, if there is one."""
        if self.part is not None:
            self.part.released()

    @property
    def _split(self) -> Literal["val", "test"]:
        return "test" if self.trainer.testing else "val"
