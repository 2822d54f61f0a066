"""Gates of key-value heads, trained instead of weights (DuoAttention, arXiv 2410.10819).

Dimensions: N layers, H key-value heads, D width of the model.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lrsa_lit.attention import LRSAConfig
from lrsa_lit.attention.budgets import heads_of
from lrsa_lit.bounds import check_integers, check_setting, is_weight
from lrsa_lit.errors import UserError, under
from lrsa_lit.objectives import Pass, Term
from lrsa_lit.objectives.teachers import OwnDense
from lrsa_lit.systems import DuoAttention
from lrsa_lit.systems.gated_heads import GatedHeads
from lrsa_lit.tasks.trained_part import TrainedPart, check_alone, share_of_step

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from lrsa_lit.data.collate import ExampleSize, TrainBatch
    from lrsa_lit.models import Backbone

_FIELD = "head_gates"


class HeadGates(TrainedPart, nn.Module):
    """One gate per head: the weight of dense attention; the rest is streaming attention to sinks and recent tokens.

    All weights are frozen. Training minimises the mean squared error of the last hidden states, compared with dense
    attention, at the positions that predict the answer, plus ``penalty`` times the mean gate. Gates start at 1 and are
    clipped to [0, 1] after each step. Use data whose answers must be searched for in the context, such as passkeys.
    Validations evaluate DuoAttention with the gates.

    Args:
        sink_size: number of first tokens that streaming attention sees in training (>= 0).
        recent: number of last tokens that it sees, including the query's own (>= 1).
        penalty: factor of the mean gate (>= 0).
        served: arguments of the evaluated DuoAttention: sparsity, sink_size, recent.

    Raises:
        UserError: an argument is out of bounds.
    """

    gates: nn.Parameter

    def __init__(
        self,
        sink_size: int = 128,
        recent: int = 256,
        penalty: float = 0.05,
        served: dict[str, Any] = {},  # noqa: B006 - read only
    ) -> None:
        super().__init__()
        self.sink_size, self.recent, self.penalty, self.arguments = sink_size, recent, penalty, served
        check_integers(self, 0, "sink_size")
        check_integers(self, 1, "recent")
        check_setting("penalty", penalty, is_weight(penalty), "a finite number >= 0")
        known = served.keys() <= {"sparsity", "sink_size", "recent"}
        check_setting("served", served, known, "settings with some of sparsity, sink_size, recent")

    def begin(self, backbone: Backbone, rule: LRSAConfig, others: dict[str, Any]) -> LRSAConfig:
        """Create a gate for each head of a model.

        Args:
            backbone: the model.
            rule: the rule of the run.
            others: other arguments of the task about training.

        Returns:
            The attention that the run evaluates.

        Raises:
            UserError: another argument asks for other training or evaluation.
        """
        check_alone(_FIELD, others, "only gates are trained")
        check_alone(_FIELD, {"backbone.lora": backbone.lora}, "all weights are frozen")
        own = {"system": rule.system, "dense_layers": rule.dense_layers, "head_top_k": rule.head_top_k}
        check_alone(_FIELD, {f"lrsa.{name}": of for name, of in own.items()}, "the gates decide which heads are dense")
        self.gates = nn.Parameter(torch.ones(backbone.config.num_hidden_layers, heads_of(backbone.config)))
        with under(f"{_FIELD}.init_args.served"):
            return rule.replace(system=DuoAttention(self.table, **self.arguments))

    @property
    def table(self) -> list[list[float]]:
        """The gates, (N, H)."""
        found: list[list[float]] = self.gates.detach().clamp(0, 1).tolist()
        return found

    @property
    def attention(self) -> LRSAConfig:
        """The training attention."""
        return LRSAConfig(system=GatedHeads(lambda: self.gates, self.sink_size, self.recent))

    @property
    def objective(self) -> Term:
        """The objective besides the penalty."""
        return _LastHidden()

    def install(self, model: Any) -> None:
        """Freeze the weights; the training attention reads the gates from here."""
        model.requires_grad_(False)

    def prepare(self, optimizer: Optimizer) -> None:
        """Clip the gates after each optimizer step."""
        optimizer.register_step_post_hook(self.clip)

    def served(self, rule: LRSAConfig) -> LRSAConfig:
        """The attention of :meth:`begin` with the current gates; its size may have been changed since."""
        assert isinstance(rule.system, DuoAttention)
        return rule.replace(system=dataclasses.replace(rule.system, gates=self.table))

    def check(self, max_tokens: int, steps: int) -> None:
        """Raise a UserError if streaming attention would see all of the longest example."""
        if self.sink_size + self.recent >= max_tokens:
            sees = f"and sink_size {self.sink_size} cover all of {max_tokens} tokens, so heads would not differ"
            raise UserError(f"{_FIELD}.init_args.recent", self.recent, reason=sees)

    def penalised(
        self, loss: Tensor, mean: Tensor, batch: TrainBatch, step: int, steps: int
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Add the penalty to the squared errors."""
        now = self.gates.detach()
        shown = {"loss/hidden": mean, "gates/mean": now.mean(), "gates/open": (now > 0.5).float().mean()}
        of_step = loss + share_of_step(batch) * self.penalty * self.gates.mean()
        return of_step, mean + self.penalty * now.mean(), {f"train/{name}": value for name, value in shown.items()}

    @torch.no_grad()
    def clip(self, *_: Any) -> None:
        """Clip the gates to [0, 1]; a hook that runs after each optimizer step."""
        self.gates.clamp_(0, 1)


class _LastHidden(Term):
    """Squared distance of the last hidden states from those with dense attention, mean over channels."""

    name = "hidden"
    uses_logits = False

    def __init__(self) -> None:
        super().__init__()
        self.teacher = OwnDense()

    def count(self, size: ExampleSize) -> int:
        return size.answer

    def loss(self, seen: Pass) -> Tensor:
        assert self.teacher is not None
        where = seen.positions.answers()
        (wanted,) = seen.taught[self.teacher].rows(where)
        dtype = torch.promote_types(wanted.dtype, torch.float32)
        return (seen.hidden[where].to(dtype) - wanted.to(dtype)).square().mean(dim=1).sum()
