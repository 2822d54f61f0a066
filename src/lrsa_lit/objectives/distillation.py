"""Divergence from a teacher's distribution of the next token (Hinton et al., arXiv 1503.02531).

Dimensions: R rows with logits, V vocabulary, n tokens that the teacher holds most likely.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax

from lrsa_lit.errors import UserError
from lrsa_lit.objectives.objective import Pass, Term
from lrsa_lit.objectives.teachers import SELF, teacher_of

if TYPE_CHECKING:
    from lrsa_lit.data.collate import ExampleSize

Direction = Literal["forward", "reverse"]


class Distillation(Term):
    """Kullback-Leibler divergence from a dense teacher at the answers and at positions drawn anew in each step.

    Args:
        teacher: "self", the same weights under dense attention in the same step; or a checkpoint, a folder or a hub
            name.
        positions: how many of an example are drawn beside those that predict its answer; fewer where it has fewer.
        temperature: of both distributions; the loss is multiplied by its square, so that gradients stay as large.
        direction: forward is KL(teacher || model), reverse KL(model || teacher).
        top_n: compare the teacher's n most likely tokens and all others as one; null compares the whole vocabulary.
        adapters: of a run that trains adapters and is its own teacher: whether the teacher has them, too.
        teacher_dtype: of the weights of a teacher that is loaded.
        weight: what the mean is multiplied with.
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
        weight: float = 1.0,
    ) -> None:
        super().__init__(weight)
        if positions < 0:
            raise UserError("positions", positions, "an integer >= 0")
        if not 0.0 < temperature < float("inf"):
            raise UserError("temperature", temperature, "a number > 0")
        if top_n is not None and top_n < 1:
            raise UserError("top_n", top_n, "an integer >= 1, or null")
        self.teacher = teacher_of(teacher, teacher_dtype, adapters=adapters)
        self.positions = positions
        self.temperature = temperature
        self.direction: Direction = direction
        self.top_n = top_n

    def count(self, size: ExampleSize) -> int:
        """Those that are drawn, and the answer's."""
        return self._drawn(size) + size.answer

    def loss(self, seen: Pass) -> Tensor:
        """Summed over both."""
        assert self.teacher is not None
        taught = seen.taught[self.teacher]
        with torch.no_grad():
            head = (taught.head or seen.head).as_autocast()

        def divergence_of(logits: Tensor, rows: Tensor) -> Tensor:
            with torch.no_grad():
                wanted = head.logits(rows)
            # Rows of the larger head stand for no token: models of one family are padded to different multiples.
            width = min(logits.shape[1], wanted.shape[1])
            logits, wanted = logits[:, :width] / self.temperature, wanted[:, :width] / self.temperature
            return self.temperature**2 * divergence(logits, wanted, self.direction, self.top_n)

        drawn = seen.positions.drawn(self._drawn, self.name, besides_answers=True)
        where = torch.cat([drawn, seen.positions.answers()])
        return seen.head.summed(divergence_of, seen.hidden[where], taught.hidden[where])

    def check(self, max_tokens: int, layers: int) -> None:
        """Refuse more positions than examples have."""
        if self.positions >= max_tokens:
            raise UserError("positions", self.positions, f"< {max_tokens}, the max_tokens of the data")

    def _drawn(self, size: ExampleSize) -> int:
        return min(self.positions, size.tokens - 1 - size.answer)


def divergence(logits: Tensor, teacher: Tensor, direction: Direction = "forward", top_n: int | None = None) -> Tensor:
    """Kullback-Leibler divergence of two distributions, summed over rows.

    Args:
        logits: (R, V), of the model.
        teacher: (R, V), of the teacher.
        direction: forward is KL(teacher || model), reverse KL(model || teacher).
        top_n: the teacher's n most likely tokens count by themselves and all others as one; None: all by themselves.
    """
    log_model, log_teacher = log_softmax(logits, dim=1), log_softmax(teacher, dim=1)
    if top_n is not None and top_n < logits.shape[1]:
        log_teacher, tokens = log_teacher.topk(top_n, dim=1)
        log_teacher, log_model = _with_rest(log_teacher), _with_rest(log_model.gather(1, tokens))
    if direction == "reverse":
        log_model, log_teacher = log_teacher, log_model
    return kl_div(log_model, log_teacher, reduction="sum", log_target=True)


def _with_rest(logs: Tensor) -> Tensor:
    """(R, n + 1), the logarithm of what is left of 1 as one more."""
    rest = -torch.expm1(torch.logsumexp(logs, dim=1, keepdim=True))
    return torch.cat([logs, rest.clamp_min(torch.finfo(logs.dtype).tiny).log()], dim=1)
