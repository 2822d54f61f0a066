"""Divergence from a teacher's distribution of the next token (Hinton et al., arXiv 1503.02531).

Dimensions: R rows with logits, V vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor
from torch.nn.functional import kl_div

from lrsa_lit.errors import UserError
from lrsa_lit.objectives.cached_teacher import Cached
from lrsa_lit.objectives.distribution import Distribution
from lrsa_lit.objectives.objective import Pass, Term
from lrsa_lit.objectives.teachers import SELF, Loaded, OwnDense, Teacher

if TYPE_CHECKING:
    from lrsa_lit.data.collate import ExampleSize

Direction = Literal["forward", "reverse"]


class Distillation(Term):
    """Kullback-Leibler divergence from a dense teacher, at the answers and at positions drawn at random in each step.

    Args:
        teacher: "self" for the same weights with dense attention in the same step; or a checkpoint, a folder or a hub
            name.
        positions: positions per example to draw in addition to those that predict the answer, if it has as many.
        temperature: temperature of both distributions. The loss is multiplied by its square to keep the gradients'
            scale.
        direction: forward is KL(teacher || model), reverse is KL(model || teacher).
        top_n: compare the teacher's n most likely tokens and all others as one; null compares the whole vocabulary.
        adapters: whether the teacher "self" uses the trained adapters or spectra. If false, the teacher is the model
            that training started from.
        teacher_dtype: dtype of the weights of a loaded teacher.
        cached: read the teacher's ``top_n`` tokens from the cache that ``lrsa distil-cache`` wrote, without loading
            the teacher.
        weight: factor of the mean.
    """

    name = "kl"

    def __init__(
        self,
        teacher: str = SELF,
        positions: int = 1024,
        temperature: float = 1.0,
        direction: Direction = "forward",
        top_n: int | None = None,
        adapters: bool = True,
        teacher_dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16",
        cached: bool = False,
        weight: float = 1.0,
    ) -> None:
        super().__init__(weight)
        if positions < 0:
            raise UserError("positions", positions, "an integer >= 0")
        if not 0.0 < temperature < float("inf"):
            raise UserError("temperature", temperature, "a number > 0")
        if top_n is not None and top_n < 1:
            raise UserError("top_n", top_n, "an integer >= 1, or null")
        self.positions = positions
        self.temperature = temperature
        self.direction: Direction = direction
        self.top_n = top_n
        own = OwnDense(adapters)
        self.teacher: Teacher = own if teacher == SELF else Loaded(teacher, teacher_dtype)
        if cached:
            self.teacher = self.as_cached()

    def count(self, size: ExampleSize) -> int:
        """The drawn positions and those of the answer."""
        return self._drawn(size) + size.answer

    def loss(self, seen: Pass) -> Tensor:
        """The loss summed over drawn and answer positions."""
        taught = seen.taught[self.teacher]
        taught_at = taught.distributions(seen.head, self.temperature, self.top_n)

        def divergence_of(logits: Tensor, *rows: Tensor) -> Tensor:
            with torch.no_grad():
                wanted = taught_at(logits.shape[1], *rows)
            return self.temperature**2 * divergence(logits / self.temperature, wanted, self.direction)

        drawn = seen.positions.drawn(self._drawn, self.name, besides_answers=True)
        where = torch.cat([drawn, seen.positions.answers()])
        return seen.head.summed(divergence_of, seen.hidden[where], *taught.rows(where))

    def as_cached(self) -> Cached:
        """The cached form of the teacher.

        Raises:
            UserError: the teacher is the trained model itself, or the whole vocabulary is compared.
        """
        if isinstance(self.teacher, Cached):
            return self.teacher
        if not isinstance(self.teacher, Loaded):
            raise UserError("teacher", SELF, "another model to be cached, because the trained one changes")
        if self.top_n is None:
            raise UserError("top_n", "null", "an integer >= 1, because the whole vocabulary is not cached")
        return Cached(self.teacher, self.top_n, self.temperature)

    def check(self, max_tokens: int, layers: int) -> None:
        """Refuse more positions than examples can have."""
        if self.positions >= max_tokens:
            raise UserError("positions", self.positions, f"< {max_tokens}, the max_tokens of the data")

    def _drawn(self, size: ExampleSize) -> int:
        return min(self.positions, size.tokens - 1 - size.answer)


def divergence(logits: Tensor, wanted: Distribution, direction: Direction = "forward") -> Tensor:
    """Kullback-Leibler divergence of two distributions, summed over rows.

    Args:
        logits: (R, V), the model's logits.
        wanted: the teacher's distributions.
        direction: forward is KL(teacher || model), reverse is KL(model || teacher).
    """
    log_model, log_teacher = wanted.bins_of(logits), wanted.logs
    if direction == "reverse":
        log_model, log_teacher = log_teacher, log_model
    return kl_div(log_model, log_teacher, reduction="sum", log_target=True)
