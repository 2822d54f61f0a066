"""RULER's tasks as records whose passages are only the needles, in their order of appearance.

Sizes are RULER's defaults: one key with one value (single); 3 further keys (multikey); 4 values of one key
(multivalue); 4 queried keys (multiquery); one chain of 4 hops (variable tracking).
"""

from __future__ import annotations

import random
import string
from collections.abc import Callable, Sequence
from functools import partial

from lrsa_lit.data.records import Passage, QARecord

NEEDLE = "One of the special magic numbers for {key} is: {value}."
HOPS = 4

_ADJECTIVES = (
    "abrupt ancient autumn bitter bold brave brief bright broad calm careful cheerful clever cloudy cold crisp "
    "curious damp dapper dark daring dusty eager early elegant faint fancy fierce fluffy fond frosty gentle giant "
    "glossy golden grand gray hasty hidden hollow humble icy idle jolly keen kind late lively lonely loud lucky "
    "mellow mighty modest muddy narrow neat nimble noble odd pale patient plain polite proud quick quiet rapid rare "
    "rough round rustic shiny shy silent silver sleepy slow smooth snowy solid spare steady stormy sturdy sunny swift "
    "tall tame tender tidy tiny vast vivid warm weary wild wise witty young zesty"
)
_NOUNS = (
    "acorn anchor apple arrow badger bakery barrel basket beacon beetle bottle branch bridge bucket button cabin "
    "candle canyon carpet castle cellar cherry circle cliff clover compass copper cottage cradle cricket crystal "
    "curtain desert donkey dragon drawer engine falcon feather fiddle flower forest fountain garden goblet guitar "
    "hammer harbor hedge helmet island jacket kettle ladder lantern lemon library lizard magnet maple marble meadow "
    "mirror mountain needle orchard otter paddle parrot pebble pencil pepper pillow planet pocket puzzle quarry "
    "rabbit ribbon river rocket saddle sailor school shovel signal spider spoon spring station statue stream sunset "
    "temple thimble ticket tunnel turtle valley velvet village violin wagon walnut window winter"
)
_KEYS = [f"{adjective}-{noun}" for adjective in _ADJECTIVES.split() for noun in _NOUNS.split()]


def magic_numbers(name: str, rng: random.Random, *, keys: int = 1, values: int = 1, queries: int = 1) -> QARecord:
    """RULER's needle in a haystack: each of ``keys`` has ``values`` 7-digit numbers; ``queries`` keys are asked for.

    The answers are all numbers of the queried keys, in the order of the question.
    """
    names = rng.sample(_KEYS, keys)
    numbers = iter(rng.sample(range(10**6, 10**7), keys * values))
    held = {key: [str(next(numbers)) for _ in range(values)] for key in names}
    needles = [(key, value) for key in names for value in held[key]]
    rng.shuffle(needles)
    asked = rng.sample(names, queries)
    listed = asked[0] if queries == 1 else f"{', '.join(asked[:-1])}, and {asked[-1]}"
    sought = "are all the special magic numbers" if values * queries > 1 else "is the special magic number"
    return QARecord(
        id=name,
        passages=_notes([NEEDLE.format(key=key, value=value) for key, value in needles]),
        question=f"What {sought} for {listed} mentioned in the provided text?",
        answers=tuple(value for key in asked for value in held[key]),
        supporting_titles=tuple(f"Note {place}" for place, (key, _) in enumerate(needles, start=1) if key in asked),
        match="all",
    )


def variable_tracking(name: str, rng: random.Random) -> QARecord:
    """RULER's chain of assignments: which variables (5 letters each) hold the number assigned to the first one?"""
    variables: list[str] = []
    while len(variables) <= HOPS:
        variable = "".join(rng.choices(string.ascii_uppercase, k=5))
        variables += [variable] if variable not in variables else []
    value = rng.randrange(10_000, 100_000)
    hops = zip(variables[1:], variables, strict=False)
    notes = _notes([f"VAR {variables[0]} = {value}", *(f"VAR {new} = VAR {old}" for new, old in hops)])
    return QARecord(
        id=name,
        passages=notes,
        question=f"Find all variables that are assigned the value {value} in the text above.",
        answers=tuple(variables),
        supporting_titles=tuple(note.title for note in notes),
        match="all",
    )


TASKS: dict[str, Callable[[str, random.Random], QARecord]] = {
    "niah_single": magic_numbers,
    "niah_multikey": partial(magic_numbers, keys=4),
    "niah_multivalue": partial(magic_numbers, values=4),
    "niah_multiquery": partial(magic_numbers, keys=4, queries=4),
    "variable_tracking": variable_tracking,
}


def _notes(texts: Sequence[str]) -> tuple[Passage, ...]:
    return tuple(Passage(f"Note {place}", text) for place, text in enumerate(texts, start=1))
