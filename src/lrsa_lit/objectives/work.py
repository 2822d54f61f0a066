"""The floating-point operations of an objective."""

from __future__ import annotations

from collections.abc import Sequence

from lrsa_lit.attention import LRSAConfig
from lrsa_lit.data.collate import ExampleSize
from lrsa_lit.models.flops import Shape, forward_flops, training_flops
from lrsa_lit.objectives.objective import Objective, Term


def flops(objective: Objective, shape: Shape, sizes: Sequence[ExampleSize], rule: LRSAConfig | None) -> int:
    """Floating-point operations of the model's and the teachers' passes over some examples.

    Args:
        objective: the objective of the run.
        shape: the shape of the model.
        sizes: the sizes of the examples.
        rule: the training attention; None means dense.
    """
    lengths = [tokens for size in sizes for tokens in size.sequences]

    def logits(terms: Sequence[Term]) -> int:
        return sum(term.logits(size) for term in terms if term.uses_logits for size in sizes)

    total = training_flops(shape, lengths, logits(objective.terms), rule)
    for teacher in dict.fromkeys(term.teacher for term in objective.terms if term.teacher is not None):
        if (of_teacher := teacher.shape(shape)) is not None:
            taught = [term for term in objective.terms if term.teacher == teacher]
            total += forward_flops(of_teacher, lengths, logits(taught), None)
    return total
