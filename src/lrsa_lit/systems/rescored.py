"""Systems of one cut that choose by the scores of another one."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

from torch import Tensor

from lrsa_lit.errors import UserError
from lrsa_lit.systems.one_shot import OneShot, Prompt
from lrsa_lit.systems.query_scores import SnapKV
from lrsa_lit.systems.system import System


@dataclass(frozen=True)
class Rescored(OneShot):
    """Chooses by the scores of another system, which has no ``kept`` or ``pairs`` of its own.

    Args:
        scorer: a system of one cut, also as the dict that its ``to_dict`` made.
    """

    scorer: OneShot = field(default_factory=SnapKV)

    def __post_init__(self) -> None:
        super().__post_init__()
        scorer = self.scorer if isinstance(self.scorer, System) else System.from_dict(self.scorer, "scorer")
        if not isinstance(scorer, OneShot) or type(scorer).keep is not OneShot.keep:
            raise UserError("scorer", type(scorer).__name__, "a system that scores tokens, such as SnapKV")
        object.__setattr__(self, "scorer", scorer)
        for item in dataclasses.fields(OneShot):
            if (own := getattr(scorer, item.name)) != item.default:
                reason = f"is not read; that of {type(self).__name__} counts"
                raise UserError(f"scorer.init_args.{item.name}", own, reason=reason)
        for name in ("window", "moments_from", "needs_rotary"):
            object.__setattr__(self, name, getattr(scorer, name))

    def floor(self, tokens: int) -> int:
        """What the scorer keeps in any case."""
        return self.scorer.floor(tokens)

    def scores(self, prompt: Prompt) -> Tensor:
        """Those of the scorer."""
        return self.scorer.scores(prompt)
