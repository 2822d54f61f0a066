"""What an engine is asked, and what it answers token by token."""

from __future__ import annotations

import random
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

Finish = Literal["stop", "length", "refused", "error"]


@dataclass(frozen=True)
class Job:
    """A prompt and how it is to be answered.

    Attributes:
        uid: its name, different from those of all others.
        ids: the prompt's tokens, one or more.
        max_new_tokens: most tokens of an answer.
        temperature: 0 takes the likeliest token each time.
        top_p: draw from the likeliest tokens whose probabilities reach this share.
        seed: of the draws; None: a new one.
        choices: answers, each drawn by itself.
    """

    uid: str
    ids: Sequence[int]
    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    choices: int = 1

    @property
    def tokens(self) -> int:
        """Of the prompt and the longest answer."""
        return len(self.ids) + self.max_new_tokens

    def draws(self) -> list[random.Random]:
        """What draws the tokens of each choice; not what else is answered meanwhile, nor on which device."""
        seed = secrets.randbits(64) if self.seed is None else self.seed
        return [random.Random(f"{seed}.{choice}") for choice in range(self.choices)]


class Event(NamedTuple):
    """What a step has brought one of a job's choices.

    Attributes:
        uid: the job's.
        choice: its number.
        token: the next one; None where there is none.
        finish: why the choice ends with it: a token that ends answers (which is not shown), the most tokens,
            a job that is too large, or an error; None: it goes on.
        cached: tokens of the prompt that were not read again.
        error: what went wrong.
    """

    uid: str
    choice: int
    token: int | None
    finish: Finish | None
    cached: int
    error: str = ""
