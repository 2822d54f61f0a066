"""A simulated world in which people move, carry things and pass them on; each step becomes a sentence.

Re-implemented from the description in Weston et al., "Towards AI-Complete Question Answering: A Set of Prerequisite Toy
Tasks", arXiv 1502.05698, section 4: a simulation of actors, places and things, in which each command becomes a sentence
with a synonym of its verb. People, places and things are bAbI's.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

PLACES = ("bathroom", "bedroom", "garden", "hallway", "kitchen", "office")
THINGS = ("apple", "football", "milk")
MOVES = ("moved to", "went to", "went back to", "journeyed to", "travelled to")
GETS = ("got", "took", "picked up", "grabbed")
DROPS = ("put down", "dropped", "discarded", "left")
GIVES = ("gave", "handed", "passed")


class Stay(NamedTuple):
    """A stay of a thing at a place, with the numbers of the facts that it follows from.

    Attributes:
        place: the place.
        came: fact in which the person who brought the thing went there.
        taken: fact in which this person got the thing.
        last: fact in which the last person who held it there went there.
    """

    place: str
    came: int
    taken: int
    last: int


class Gift(NamedTuple):
    """Who gave what to whom, and the number of that fact."""

    giver: str
    thing: str
    taker: str
    fact: int


class World:
    """The state of the world. Before their first move, people have no place and carry nothing.

    Args:
        rng: random generator that decides what happens.
        people: names of the people.

    Attributes:
        facts: the sentences so far.
        place: place of each person who has moved.
        came: number of the fact with each person's last move.
        holder: the person who carries each carried thing.
        handled: number of the last fact about each thing that was ever taken.
        trail: the stays of each thing since it was first taken.
        handlings: numbers of the facts in which each person took, left, gave or received something.
        gifts: all gifts so far.
    """

    def __init__(self, rng: random.Random, people: Sequence[str]) -> None:
        self._rng, self.people = rng, people
        self._lies = {thing: rng.choice(PLACES) for thing in THINGS}
        self.facts: list[str] = []
        self.place: dict[str, str] = {}
        self.came: dict[str, int] = {}
        self.holder: dict[str, str] = {}
        self.handled: dict[str, int] = {}
        self.trail: defaultdict[str, list[Stay]] = defaultdict(list)
        self.handlings: defaultdict[str, list[int]] = defaultdict(list)
        self.gifts: list[Gift] = []

    def step(self, kinds: Sequence[str]) -> None:
        """Add a fact of a kind drawn from ``kinds`` (move, get, drop, give); a move if that kind is not possible."""
        kind = self._rng.choice(kinds)
        if kind == "get":
            near = [(who, what) for who in self.place for what in self._lies if self._lies[what] == self.place[who]]
            if near:
                return self._get(*self._rng.choice(near))
        elif kind == "drop" and self.holder:
            return self._drop(self._rng.choice(list(self.holder)))
        elif kind == "give":
            together = [
                (what, taker)
                for what, giver in self.holder.items()
                for taker, place in self.place.items()
                if taker != giver and place == self.place[giver]
            ]
            if together:
                return self._give(*self._rng.choice(together))
        return self._move(self._rng.choice(self.people))

    def _move(self, who: str) -> None:
        place = self._rng.choice([place for place in PLACES if place != self.place.get(who)])
        self.place[who], self.came[who] = place, len(self.facts)
        for what in (what for what, holder in self.holder.items() if holder == who):
            self.trail[what].append(Stay(place, self.came[who], self.handled[what], self.came[who]))
        self.facts.append(f"{who} {self._rng.choice(MOVES)} the {place}.")

    def _get(self, who: str, what: str) -> None:
        del self._lies[what]
        self.holder[what] = who
        self._received(who, what)
        self._tell(f"{who} {self._rng.choice(GETS)} the {what}", what, who)

    def _drop(self, what: str) -> None:
        who = self.holder.pop(what)
        self._lies[what] = self.place[who]
        self._tell(f"{who} {self._rng.choice(DROPS)} the {what}", what, who)

    def _give(self, what: str, taker: str) -> None:
        giver, self.holder[what] = self.holder[what], taker
        self._received(taker, what)
        self.gifts.append(Gift(giver, what, taker, len(self.facts)))
        self._tell(f"{giver} {self._rng.choice(GIVES)} the {what} to {taker}", what, giver, taker)

    def _received(self, who: str, what: str) -> None:
        stays, came = self.trail[what], self.came[who]
        if stays:
            stays[-1] = stays[-1]._replace(last=came)
        else:
            stays.append(Stay(self.place[who], came, len(self.facts), came))

    def _tell(self, sentence: str, what: str, *people: str) -> None:
        self.handled[what] = len(self.facts)
        for who in people:
            self.handlings[who].append(len(self.facts))
        self.facts.append(sentence + self._rng.choice((".", " there.")))
