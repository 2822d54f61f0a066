"""Jobs, which an engine answers, and events, which it returns for each token."""

from __future__ import annotations

import random
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

Finish = Literal["stop", "length", "refused", "error"]


@dataclass(frozen=True)
class Job:
    """A prompt and the settings of its answers.

    Attributes:
        uid: a unique id.
        ids: the token ids of the prompt, one or more.
        max_new_tokens: the most tokens per answer.
        temperature: 0 always takes the most likely token.
        top_p: draw from the most likely tokens whose probabilities sum up to this share.
        seed: the seed of the draws; None means a random one.
        choices: the number of answers, which are drawn independently.
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
        """The number of tokens of the prompt and the longest answer."""
        return len(self.ids) + self.max_new_tokens

    def draws(self) -> list[random.Random]:
        """The random generator of each choice. It does not depend on other jobs or on the device."""
        seed = secrets.randbits(64) if self.seed is None else self.seed
        return [random.Random(f"{seed}.{choice}") for choice in range(self.choices)]


class Event(NamedTuple):
    """The result of a step for one choice of a job.

    Attributes:
        uid: the id of the job.
        choice: the index of the choice.
        token: the next token; None if there is none.
        finish: why the choice ends: "stop" (a stop token, which is not in ``token``), "length" (``max_new_tokens``),
            "refused" (the job is too large) or "error". None if it continues.
        cached: tokens of the prompt that were restored from a snapshot.
        error: the error message.
    """

    uid: str
    choice: int
    token: int | None
    finish: Finish | None
    cached: int
    error: str = ""
