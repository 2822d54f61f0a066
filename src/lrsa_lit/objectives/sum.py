"""A weighted sum of objectives."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from lrsa_lit.errors import UserError
from lrsa_lit.objectives.objective import Objective, Term


class Sum(Objective):
    """The weighted sum of several objectives. Each is averaged over its own positions and logged separately.

    Args:
        objectives: at least one objective, no two of the same kind. Each has its own weight.
    """

    def __init__(self, objectives: Sequence[Objective]) -> None:
        self._terms = tuple(term for objective in objectives for term in objective.terms)
        for name, times in Counter(term.name for term in self._terms).items():
            if times > 1:
                raise UserError("objectives", reason=f"has {times} of the kind {name}", hint="use one of each at most")
        if not any(term.weight for term in self._terms):
            raise UserError("objectives", list(objectives), "at least one objective with a weight > 0")

    @property
    def terms(self) -> Sequence[Term]:
        """The terms of all objectives."""
        return self._terms

    def check(self, max_tokens: int, layers: int) -> None:
        """Check each term."""
        for term in self._terms:
            term.check(max_tokens, layers)
