"""Learned spectra of keys and values, after SoCo (arXiv 2502.15092).

From the paper we know the factorisation, the deviation, three phases by step, one threshold for all layers, and an
objective of compression, divergence and sparsity. The formulas are ours, so report results as "after SoCo".

The constants are ours, too. At the initial score of 1, the gradients of ratio and divergence should have a similar
size. A threshold of 0.05 and a temperature of 0.1 make the sigmoid flat there: with a weight of 1 no score decreases,
and a score of 0 would still count as 0.38 of a component.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import relu

from lrsa_lit.attention import LRSAConfig
from lrsa_lit.bounds import check_setting, is_weight
from lrsa_lit.errors import UserError
from lrsa_lit.models.spectral_budget import SpectralBudget
from lrsa_lit.models.spectrum import SpectrumLinear, counted, cut, ratio_of, spectra_of, undecided, whole_again
from lrsa_lit.tasks.trained_part import TrainedPart, check_alone, share_of_step

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from lrsa_lit.data.collate import TrainBatch
    from lrsa_lit.models import Backbone

_FIELD = "spectra"
_BLOCK = 10
"""In the second phase, compression is on for this many steps, then off for as many, and so on."""


class SoCo(TrainedPart):
    """Trains only scores of the singular values of key and value projections, and a deviation of their outputs.

    A cache holds one number per token and component. A component counts as kept to the degree p, and R is the sum of p
    as a share of the width of keys and values. In the first phase, training adds ``ratio_weight`` relu(R - ratio) to
    the objective. In the second phase this is on and off in turns of 10 steps. In the third phase it is
    ``ratio_weight`` |R - ratio| + ``decision_weight`` mean p (1 - p). Evaluations use the components with scores above
    the threshold; if there are too many, those with the highest scores. ``lrsa ask`` and ``lrsa export`` convert a
    checkpoint's kept components to low-rank factors.

    In the paper, the rest of the objective is the divergence from the original model: Distillation with
    ``teacher: self`` and ``adapters: false``.

    Args:
        ratio: the share of the numbers in dense keys and values that may be kept, in (0, 1].
        threshold: threshold of the scores, which range from 0 to 2 and start at 1.
        temperature: p is sigmoid((score - threshold) / temperature) (> 0).
        phases: the three phases as shares of the steps; they must sum to 1.
        ratio_weight: weight of the ratio's penalty (>= 0).
        decision_weight: weight of the penalty p (1 - p) on undecided components (>= 0).
        deviation_rate: learning rate of the deviation, as a share of the optimizer's rate (>= 0).
        grouping: "joint" decomposes the keys, or values, of all heads of a layer together, "head" each key-value
            head's separately. With "head", heads keep different numbers of components, which caches of latents do not
            support.
        dense_layers: layers that are not decomposed; the ratio refers to the other layers.

    Raises:
        UserError: an argument is out of bounds.
    """

    def __init__(
        self,
        ratio: float,
        threshold: float = 0.5,
        temperature: float = 0.15,
        phases: Sequence[float] = (0.3, 0.4, 0.3),
        ratio_weight: float = 10.0,
        decision_weight: float = 1.0,
        deviation_rate: float = 0.01,
        grouping: Literal["joint", "head"] = "joint",
        dense_layers: Sequence[int] = (),
    ) -> None:
        self.budget = SpectralBudget(ratio, threshold, grouping, tuple(dense_layers))
        self.phases = tuple(phases)
        shares = len(self.phases) == 3 and all(is_weight(share) and share > 0 for share in self.phases)
        check_setting(
            "phases", list(self.phases), shares and abs(sum(self.phases) - 1) < 1e-6, "three shares > 0 that sum to 1"
        )
        for name, value in (
            ("ratio_weight", ratio_weight), ("decision_weight", decision_weight), ("deviation_rate", deviation_rate)
        ):  # fmt: skip
            check_setting(name, value, is_weight(value), "a finite number >= 0")
        check_setting("temperature", temperature, is_weight(temperature) and temperature > 0, "a finite number > 0")
        self.temperature = temperature
        self.ratio_weight, self.decision_weight, self.deviation_rate = ratio_weight, decision_weight, deviation_rate
        self.layers: dict[str, SpectrumLinear] = {}
        self._backbone: Backbone | None = None

    def begin(self, backbone: Backbone, others: dict[str, Any]) -> None:
        """Refuse settings that cannot be combined with spectra.

        Args:
            backbone: the model.
            others: other arguments of the task about what is trained.

        Raises:
            UserError: something else would be trained as well, or the weights are quantised or factored.
        """
        check_alone(_FIELD, {"backbone.lora": backbone.lora} | others, "all weights are frozen")
        check_alone(_FIELD, {"backbone.quantization": backbone.quantization}, "quantised weights cannot be decomposed")
        check_alone(_FIELD, {"backbone.low_rank": backbone.low_rank}, "only whole projections can be decomposed")
        self._backbone = backbone

    def check(self, max_tokens: int, steps: int) -> None:
        """Refuse phases without a step, and a model whose keys and values cannot be decomposed."""
        self._ends(steps)
        if self._backbone is not None:
            if self._backbone.has_factors:
                raise UserError(_FIELD, self._backbone.source, reason="has low-rank factors already")
            try:
                self.budget.check(self._backbone.config)
            except UserError as error:
                if error.field != _FIELD:
                    error.field = f"{_FIELD}.init_args.{error.field}"
                raise

    def install(self, model: Any) -> None:
        """Decompose key and value projections; only scores and deviations get gradients."""
        model.requires_grad_(False)
        self.budget.install(model)
        self.layers = spectra_of(model)

    def groups(self, parameters: list[Any]) -> list[Any]:
        """Two groups: scores and deviations."""
        # Deviations are vectors; scores have a row for each block.
        parts = ([each for each in parameters if each.ndim == number] for number in (2, 1))
        return [{"params": part} for part in parts]

    def prepare(self, optimizer: Optimizer) -> None:
        """Lower the learning rate of deviations."""
        optimizer.param_groups[1]["lr"] *= self.deviation_rate

    def phase(self, step: int, steps: int) -> int:
        """The phase of a step: 1, 2 or 3."""
        return 1 + sum(step >= end for end in self._ends(steps)[:2])

    def penalty(self, scores: Sequence[Tensor], whole: int, step: int, steps: int) -> Tensor:
        """The penalty that is added to the objective in a step.

        Args:
            scores: (G, R) for each layer.
            whole: how many numbers a token's dense keys and values have in these layers.
            step: the optimizer step, from 0.
            steps: optimizer steps of the fit.
        """
        counts = [self._counted(each) for each in scores]
        excess, phase = ratio_of(counts, whole) - self.budget.ratio, self.phase(step, steps)
        if phase == 3:
            return self.ratio_weight * excess.abs() + self.decision_weight * undecided(counts)
        if phase == 2 and step // _BLOCK % 2 == 1:
            # DDP needs a gradient for every weight, even if it is zero.
            return 0 * excess
        return self.ratio_weight * relu(excess)

    def _counted(self, scores: Tensor) -> Tensor:
        return counted(scores, self.budget.threshold, self.temperature)

    def penalised(
        self, loss: Tensor, mean: Tensor, batch: TrainBatch, step: int, steps: int
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Add the penalty of the step's phase."""
        scores, whole = [layer.scores for layer in self.layers.values()], self._whole
        penalty = self.penalty(scores, whole, step, steps)
        with torch.no_grad():
            counts = [self._counted(each) for each in scores]
            shown = {
                "train/loss/objective": mean,
                "train/spectra/ratio": ratio_of(counts, whole),
                "train/spectra/undecided": undecided(counts),
                "train/spectra/phase": torch.tensor(float(self.phase(step, steps))),
            }
        return loss + share_of_step(batch) * penalty, mean + penalty.detach(), shown

    def described(self, steps: int) -> dict[str, Any]:
        """The description in a checkpoint: the budget, and the steps of the fit, which determine the phases."""
        return {**dataclasses.asdict(self.budget), "total_steps": steps}

    def served(self, rule: LRSAConfig) -> LRSAConfig:
        """Use only the components that the current scores keep; the attention does not change."""
        scores = {name: layer.scores for name, layer in self.layers.items()}
        cut(self.layers.values(), self.budget.kept(scores, self._whole))
        return rule

    def released(self) -> None:
        """Use all components again."""
        whole_again(self.layers.values())

    @property
    def _whole(self) -> int:
        return sum(layer.out_features for layer in self.layers.values())

    def _ends(self, steps: int) -> list[int]:
        """The first step after each phase."""
        ends = [round(share * steps) for share in itertools.accumulate(self.phases)] if steps > 0 else [0, 0, 0]
        if not 0 < ends[0] < ends[1] < ends[2]:
            reason = f"leaves a phase without a step; trainer.max_steps is {steps}"
            raise UserError(f"{_FIELD}.init_args.phases", list(self.phases), reason=reason)
        return ends
