"""bAbI's first seven tasks: a question about a :class:`~lrsa_lit.data.fact_world.World`, and the facts that answer it.

The facts and questions of each task follow Weston et al., arXiv 1502.05698, section 3 and its appendix. Two choices are
this project's own: the numbers of facts, and that no question with two answers is asked.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

from lrsa_lit.data.fact_world import PLACES, World
from lrsa_lit.data.prompts import Prompt
from lrsa_lit.data.records import Passage, QARecord

_PEOPLE = ("Daniel", "John", "Mary", "Sandra")
_GIVERS = ("Bill", "Fred", "Jeff", "Mary")
_COUNTS = ("none", "one", "two", "three")
_OPPOSITE = {"north": "south", "south": "north", "east": "west", "west": "east"}


class Asked(NamedTuple):
    """A question, its answer, and the numbers of the facts that support it."""

    question: str
    answer: str
    support: Sequence[int]


Ask = Callable[[World, random.Random], Asked | None]
"""Draws a question about a world; returns None if there is nothing to ask or the question would have two answers."""


def where_is_someone(world: World, rng: random.Random) -> Asked:
    """Task 1, one supporting fact: the place of a person who has moved."""
    who = rng.choice(list(world.place))
    return Asked(f"Where is {who}?", world.place[who], [world.came[who]])


def where_is_something(world: World, rng: random.Random) -> Asked | None:
    """Task 2, two supporting facts: the place of a thing that was taken."""
    if not world.handled:
        return None
    what = rng.choice(list(world.handled))
    stay = world.trail[what][-1]
    return Asked(f"Where is the {what}?", stay.place, [stay.last, world.handled[what]])


def where_was_something(world: World, rng: random.Random) -> Asked | None:
    """Task 3, three supporting facts: where a thing was before it came to a place that it visited only once."""
    found = []
    for what, stays in world.trail.items():
        places = [stay.place for stay in stays]
        found += [(what, *pair) for pair in itertools.pairwise(stays) if places.count(pair[1].place) == 1]
    if not found:
        return None
    what, before, after = rng.choice(found)
    support = [before.last, after.taken, after.came]
    return Asked(f"Where was the {what} before the {after.place}?", before.place, support)


def who_gave_what(world: World, rng: random.Random) -> Asked | None:
    """Task 5, three-argument relations: who gave what to whom; the question must fit exactly one gift."""
    if not world.gifts:
        return None
    gift = rng.choice(world.gifts)
    known, question, answer = rng.choice(
        [
            ({"giver", "taker"}, f"What did {gift.giver} give to {gift.taker}?", gift.thing),
            ({"giver", "thing"}, f"Who did {gift.giver} give the {gift.thing} to?", gift.taker),
            ({"thing", "taker"}, f"Who gave the {gift.thing} to {gift.taker}?", gift.giver),
            ({"thing"}, f"Who gave the {gift.thing}?", gift.giver),
            ({"thing"}, f"Who received the {gift.thing}?", gift.taker),
        ]
    )
    fitting = [other for other in world.gifts if all(getattr(other, name) == getattr(gift, name) for name in known)]
    return Asked(question, answer, [gift.fact]) if len(fitting) == 1 else None


def is_someone_there(world: World, rng: random.Random) -> Asked:
    """Task 6, yes or no: whether a person is in a place; both answers are equally likely."""
    who = rng.choice(list(world.place))
    others = [place for place in PLACES if place != world.place[who]]
    place = rng.choice([world.place[who], rng.choice(others)])
    return Asked(f"Is {who} in the {place}?", "yes" if place == world.place[who] else "no", [world.came[who]])


def how_many(world: World, rng: random.Random) -> Asked | None:
    """Task 7, counting: how many things a person carries, of those who have handled a thing."""
    if not world.handlings:
        return None
    who = rng.choice(list(world.handlings))
    count = list(world.holder.values()).count(who)
    return Asked(f"How many objects is {who} carrying?", _COUNTS[count], world.handlings[who])


def told(
    name: str, rng: random.Random, *, people: Sequence[str], kinds: Sequence[str], facts: tuple[int, int], ask: Ask
) -> QARecord:
    """Simulate a world and ask a question about it.

    The number of facts is drawn between the two of ``facts``; more facts are added until a question can be asked. Each
    fact is of one of the ``kinds`` (see :meth:`World.step`).
    """
    world, least = World(rng, people), rng.randint(*facts)
    while True:
        world.step(kinds)
        if len(world.facts) >= least and (asked := ask(world, rng)):
            return _record(name, world.facts, asked)


def two_places(name: str, rng: random.Random) -> QARecord:
    """Task 4, two-argument relations: two facts about one place, one of which answers the question."""
    middle, *others = rng.sample(PLACES, 3)
    ways = rng.sample(list(_OPPOSITE), 2)
    sides = list(zip(others, ways, strict=True))
    facts = [
        rng.choice([f"The {other} is {way} of the {middle}.", f"The {middle} is {_OPPOSITE[way]} of the {other}."])
        for other, way in sides
    ]
    asked = rng.randrange(2)
    other, way = sides[asked]
    question = rng.choice([f"What is {way} of the {middle}?", f"What is the {middle} {_OPPOSITE[way]} of?"])
    return _record(name, facts, Asked(question, other, [asked]))


def _record(name: str, facts: Sequence[str], asked: Asked) -> QARecord:
    titles = [f"Fact {number}" for number in range(1, len(facts) + 1)]
    return QARecord(
        id=name,
        passages=tuple(Passage(title, f"{fact} ") for title, fact in zip(titles, facts, strict=True)),
        question=asked.question,
        answers=(asked.answer,),
        supporting_titles=tuple(titles[place] for place in sorted(set(asked.support))),
    )


class FactTask(NamedTuple):
    """A function that makes a record from an id and a random generator, and the prompt of its question."""

    make: Callable[[str, random.Random], QARecord]
    prompt: Prompt


def _prompt(about: str, rule: str, answer: str, *examples: str) -> Prompt:
    """A prompt with BABILong's parts in its order: instruction, examples, answer format, context and question."""
    instruction = f"I will give you a text in which facts about {about} are hidden, and a question."
    solved = "\n\n".join(f"<example>\n{example}\n</example>" for example in examples)
    form = f"Your answer should contain only one word: {answer}. Do not write anything else after that."
    parts = f"{instruction} Answer it from these facts alone. {rule}".strip(), solved, form
    return Prompt("\n\n".join([*parts, "<context>\n{context}\n</context>", "Question: {input}"]), heading=None)


_LATEST = "A person who was in several places is in the latest of them."
_CARRIED = "A thing is where the person is who carries it, and stays where it is put down."
_HANDLED = ("move", "get", "drop")
_GIVEN = ("move", "get", "give")

FACT_TASKS = {
    "qa1": FactTask(
        partial(told, people=_PEOPLE, kinds=("move",), facts=(2, 10), ask=where_is_someone),
        _prompt(
            "the places of persons",
            _LATEST,
            "the place",
            "Alan went to the cellar. Ruth moved to the attic. Alan travelled to the porch. "
            "Where is Alan?\nAnswer: porch",
            "Ruth went back to the porch. Alan moved to the attic. Where is Ruth?\nAnswer: porch",
        ),
    ),
    "qa2": FactTask(
        partial(told, people=_PEOPLE, kinds=_HANDLED, facts=(4, 20), ask=where_is_something),
        _prompt(
            "the places and actions of persons",
            _CARRIED,
            "the place",
            "Alan went to the cellar. Alan got the lamp there. Alan moved to the attic. "
            "Where is the lamp?\nAnswer: attic",
            "Ruth moved to the porch. Ruth took the coin. Ruth dropped the coin. Ruth went to the attic. "
            "Where is the coin?\nAnswer: porch",
        ),
    ),
    "qa3": FactTask(
        partial(told, people=_PEOPLE, kinds=_HANDLED, facts=(6, 32), ask=where_was_something),
        _prompt(
            "the places and actions of persons",
            _CARRIED,
            "the place",
            "Alan went to the cellar. Alan got the lamp there. Alan moved to the attic. Alan moved to the porch. "
            "Where was the lamp before the porch?\nAnswer: attic",
            "Ruth moved to the porch. Ruth took the coin. Ruth went to the attic. "
            "Where was the coin before the attic?\nAnswer: porch",
        ),
    ),
    "qa4": FactTask(
        two_places,
        _prompt(
            "how places lie to each other",
            "",
            "the place",
            "The attic is north of the porch. The porch is east of the cellar. "
            "What is north of the porch?\nAnswer: attic",
            "The cellar is west of the attic. The porch is east of the attic. "
            "What is the attic west of?\nAnswer: porch",
        ),
    ),
    "qa5": FactTask(
        partial(told, people=_GIVERS, kinds=_GIVEN, facts=(4, 20), ask=who_gave_what),
        _prompt(
            "what persons gave to each other",
            "",
            "the person or the thing",
            "Alan took the lamp there. Alan handed the lamp to Ruth. Who received the lamp?\nAnswer: Ruth",
            "Ruth got the coin. Ruth gave the coin to Alan. What did Ruth give to Alan?\nAnswer: coin",
        ),
    ),
    "qa6": FactTask(
        partial(told, people=_PEOPLE, kinds=("move",), facts=(2, 10), ask=is_someone_there),
        _prompt(
            "the places of persons",
            _LATEST,
            "yes or no",
            "Alan went to the cellar. Alan travelled to the porch. Is Alan in the porch?\nAnswer: yes",
            "Ruth moved to the attic. Ruth went back to the porch. Is Ruth in the attic?\nAnswer: no",
        ),
    ),
    "qa7": FactTask(
        partial(told, people=_PEOPLE, kinds=("move", "get", "get", "drop", "give"), facts=(4, 20), ask=how_many),
        _prompt(
            "persons and the things that they carry",
            "",
            "none, one, two or three",
            "Alan went to the cellar. Alan got the lamp there. How many objects is Alan carrying?\nAnswer: one",
            "Ruth took the coin. Ruth passed the coin to Alan. How many objects is Ruth carrying?\nAnswer: none",
        ),
    ),
}
