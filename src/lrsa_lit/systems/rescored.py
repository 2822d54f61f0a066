"""One-shot systems that use the scores of another one-shot system."""

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
    """A system that chooses by another system's scores; only this system's ``kept`` and ``pairs`` apply.

    Args:
        scorer: a one-shot system that scores tokens, or its dict from ``to_dict``.
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
                reason = f"is not used; set it in {type(self).__name__}"
                raise UserError(f"scorer.init_args.{item.name}", own, reason=reason)
        for name in ("window", "moments_from", "needs_rotary"):
            object.__setattr__(self, name, getattr(scorer, name))

    def floor(self, tokens: int) -> int:
        """The pairs that the scorer always keeps."""
        return self.scorer.floor(tokens)

    def scores(self, prompt: Prompt) -> Tensor:
        """The scores of the scorer."""
        return self.scorer.scores(prompt)
