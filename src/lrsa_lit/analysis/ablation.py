"""Callbacks that rank, on the user's own data, which layers to leave dense and which heads may keep less."""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lrsa_lit.analysis.capture import first_rows
from lrsa_lit.analysis.head_worths import HeadWorths
from lrsa_lit.analysis.layer_gains import LayerGains, Question, exactly
from lrsa_lit.attention import LRSAConfig, attached
from lrsa_lit.attention.budgets import heads_of
from lrsa_lit.errors import UserError
from lrsa_lit.io import write_atomically
from lrsa_lit.strategies import gathered
from lrsa_lit.terminal import PlainConsole
from lrsa_lit.tracking.artifacts import numbered, run_folder, upload

if TYPE_CHECKING:
    from torch.utils.data import DataLoader

    from lrsa_lit.data.collate import Batch


class LayerAblation(Callback):
    """Rank layers by the answer loss when only one is dense; suggest which layers to leave dense.

    The callback uses the questions of ``lrsa validate`` and does nothing in a fit. It costs N + 2 forward passes per
    question for N layers, in addition to the validation. It prints the layers, best first, with 95 % intervals over the
    questions, and the settings that leave as many layers dense as ``share`` allows. ``layers.json`` has the same, and
    the losses of each question. This file is in the run's folder, beside its checkpoints, and an artifact of the MLflow
    run; without MLflow, the folder is a new ``validate-1``. Each layer is tested alone, while all others have the run's
    rule, so joint effects of several dense layers are not measured. ``dense_layers`` of the run's rule are ignored.

    Args:
        top_k: K of the sparse layers during the ablation, 0 <= K < L; null uses the run's.
        share: share of the key-value pairs that the suggestion may keep over all layers, 1/L <= share < 1. A dense
            layer keeps 1, a sparse one K/L.
        limit: number of validation questions to use, from the first; null uses all.
    """

    name = "layers"
    only_validates = True
    """The command line leaves the callback out of fits."""

    def __init__(self, top_k: int | None = None, share: float = 0.25, limit: int | None = None) -> None:
        if top_k is not None and top_k < 0:
            raise UserError("top_k", top_k, "an integer >= 0")
        if not 0 < share < 1:
            raise UserError("share", share, "between 0 and 1")
        if limit is not None and limit < 1:
            raise UserError("limit", limit, "an integer >= 1")
        self.top_k, self.share, self.limit = top_k, share, limit
        self._rule: LRSAConfig | None = None
        self._questions: list[Question] = []
        self._found: tuple[LayerGains, Path] | None = None

    def check_settings(self, task: LightningModule, stage: str) -> None:
        """Check the settings against the run's rule; the command line calls this before it prepares anything.

        Raises:
            UserError: ``top_k`` (or the run's) or ``share`` does not fit the lag size.
        """
        if stage == "validate":
            self._sparse(task)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Make the rule for the ablation."""
        self._rule = self._sparse(pl_module) if stage == "validate" else None
        self._questions, self._found = [], None

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
        *_: Any,
        **__: Any,
    ) -> None:
        """Run the questions of a batch with no dense layer, with each single dense layer, and with all layers dense."""
        if self._rule is None:
            return
        count = len(batch["id"])
        if self.limit is not None:
            # Each device has every R-th batch. All must do equally many forward passes, as sharded models require.
            size = cast("DataLoader[Any]", trainer.val_dataloaders).batch_size or 1
            first = batch_idx * trainer.world_size * size
            within = sum(position < self.limit for position in batch["position"])
            count = max(within, 1) if first < self.limit else 0
        if count:
            with trainer.precision_plugin.forward_context():
                attentions = self._attentions(pl_module, self._rule)
                self._questions.extend(_ablated(pl_module, first_rows(batch, count), attentions))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the results of all devices."""
        if self._rule is None:
            return
        of_all = (question for share in gathered(self._questions) for question in share if not question.repeated)
        questions = sorted(of_all, key=lambda question: question.position)
        if questions and trainer.is_global_zero:
            found = self._gains(pl_module, self._rule, questions[: self.limit])
            path = next(path for path in numbered(run_folder(trainer) / f"{self.name}.json") if not path.exists())
            upload(trainer, self._write(found, path))
            self._found = found, path

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Print the results after the progress bar has closed."""
        if self._found is None:
            return
        (found, path), self._found = self._found, None
        console = PlainConsole()
        console.print(found.table())
        console.say(self._suggested(found, path))
        console.say(f"{self.name.capitalize()}: {path}")

    def _attentions(self, task: Any, rule: LRSAConfig) -> list[LRSAConfig | None]:
        """The rule, the variants that are ranked, and dense attention."""
        layers = range(task.model.config.get_text_config().num_hidden_layers)
        return [rule, *(rule.replace(dense_layers=(layer,)) for layer in layers), None]

    def _gains(self, task: Any, rule: LRSAConfig, questions: list[Question]) -> LayerGains:
        return LayerGains(rule, task.backbone.name, questions)

    def _write(self, found: LayerGains, path: Path) -> list[Path]:
        """Write the results, and return the files."""
        text = json.dumps(found.to_dict(self.share), ensure_ascii=False, indent=1)
        write_atomically(path, lambda file: file.write(text.encode()))
        return [path]

    def _suggested(self, found: LayerGains, path: Path) -> str:
        return str(found.suggestion(self.share))

    def _sparse(self, task: Any) -> LRSAConfig:
        """The run's rule without dense layers, with another K if ``top_k`` is set."""
        rule: LRSAConfig = task.lrsa
        if rule.system is not None:
            system = type(rule.system).__name__
            raise UserError("lrsa.system", system, reason=f"has no K; {type(self).__name__} is for rules")
        if self.top_k is None and rule.head_top_k is not None:
            raise UserError("top_k", reason="must be set if the run has head_top_k, as the others need a single K")
        key, top_k = ("lrsa.top_k", rule.top_k) if self.top_k is None else ("top_k", self.top_k)
        if top_k >= rule.lag_size:
            below = f"below lag_size ({rule.lag_size}), as layers that drop nothing are dense"
            raise UserError(key, top_k, below, reason=f"is not allowed for {type(self).__name__}")
        if exactly(self.share) * rule.lag_size < 1:
            least = f"1/{rule.lag_size} or more: K = 1 in all layers keeps this share"
            raise UserError("share", self.share, f"{least} with lag_size {rule.lag_size}")
        return rule.replace(top_k=top_k, dense_layers=())


class HeadAblation(LayerAblation):
    """Rank key-value heads by the answer loss when only one keeps nothing; assign each head a K.

    Like :class:`LayerAblation`, with N H + 2 forward passes per question for N layers of H heads: one head has K = 0,
    and all others have the run's rule. It writes ``heads.json`` with the loss increase (N, H) of each head, and
    ``head_top_k.json``, which can be passed as ``model.lrsa.head_top_k``: K = L for the best heads and 0 for the
    others, with a mean of ``share`` times L. ``write_budgets`` in ``head_worths`` makes such a file for another mean,
    also from a ``layers.json``.

    Args:
        top_k: K of the other heads during the ablation, 1 <= K < L; null uses the run's.
        share: share of the key-value pairs that all heads keep together, 1/L <= share < 1.
        limit: number of validation questions to use, from the first; null uses all.
    """

    name = "heads"

    def _attentions(self, task: Any, rule: LRSAConfig) -> list[LRSAConfig | None]:
        config = task.model.config
        layers, heads = range(config.get_text_config().num_hidden_layers), range(heads_of(config))
        alone = [
            [[0 if (layer, head) == one else rule.top_k for head in heads] for layer in layers]
            for one in itertools.product(layers, heads)
        ]
        return [rule, *(rule.replace(head_top_k=budgets) for budgets in alone), None]

    def _gains(self, task: Any, rule: LRSAConfig, questions: list[Question]) -> HeadWorths:
        return HeadWorths(rule, task.backbone.name, questions, heads_of(task.model.config))

    def _write(self, found: LayerGains, path: Path) -> list[Path]:
        assert isinstance(found, HeadWorths)
        budgets = json.dumps(found.budgets(self.share))
        write_atomically(self._budgets(path), lambda file: file.write(budgets.encode()))
        return [*super()._write(found, path), self._budgets(path)]

    def _suggested(self, found: LayerGains, path: Path) -> str:
        return f"{100 * self.share:.3g} % kept: --model.lrsa.head_top_k {shlex.quote(str(self._budgets(path)))}"

    def _budgets(self, path: Path) -> Path:
        """The file of the budgets, beside that of the ranking."""
        return path.with_name(path.name.replace(self.name, "head_top_k", 1))

    def _sparse(self, task: Any) -> LRSAConfig:
        rule = super()._sparse(task)
        if rule.top_k == 0:
            key = "lrsa.top_k" if self.top_k is None else "top_k"
            raise UserError(key, 0, "1 or more", reason="leaves no head anything to lose")
        return rule


def _ablated(task: Any, batch: Batch, attentions: list[LRSAConfig | None]) -> list[Question]:
    """Losses of a batch's questions under each attention."""
    with _unwarned():
        losses, tokens = zip(*(task.losses(batch, attention) for attention in attentions), strict=True)
    by_question = torch.stack(losses, dim=1).tolist()
    of_rows = batch["id"], batch["position"], batch["repeated"], tokens[0].tolist(), by_question
    return [Question(*values) for values in zip(*of_rows, strict=True)]


@contextlib.contextmanager
def _unwarned() -> Iterator[None]:
    """Suppress the warning that weights were trained with another rule, which each of the N + 2 rules would cause."""
    log, silent = logging.getLogger(attached.__name__), lambda record: False
    log.addFilter(silent)
    try:
        yield
    finally:
        log.removeFilter(silent)
