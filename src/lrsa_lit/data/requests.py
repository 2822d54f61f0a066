"""Generated short texts of several kinds on many topics, and requests for them; all wording is this project's own."""

from __future__ import annotations

import random
import re

_TOPICS = (
    "bakeries beavers bicycles candles castles clocks deserts dragons fountains foxes gardens geese glaciers goats "
    "harbours hedgehogs kites lanterns libraries lighthouses markets mirrors mountains orchards otters owls penguins "
    "pirates rivers robots sailors sparrows spiders tapirs teapots trains turtles umbrellas violins volcanoes"
)
TOPICS = tuple(_TOPICS.split())
_WORDS = {
    "adj": "amber bold brittle calm crooked distant eager faded gentle hollow humble idle merry pale patient quiet "
    "restless rusty shy silver solemn tender velvet weary wild",
    "noun": "anchor attic barrel bell bridge candle cellar compass drum feather ferry hammer kettle ladder meadow "
    "needle oven pebble quilt ribbon saddle shutter staircase thimble wheel",
    "verb": "argue bow dance drift fade gather hesitate hum kneel listen murmur nod pause quarrel rest shiver sing "
    "sleep stumble tremble vanish wait wander whisper yawn",
    "time": "dawn dusk midday midnight noon nightfall sunrise sunset teatime twilight",
    "name": "Ada Boris Carla Dmitri Elsa Farid Greta Hugo Ines Jonas Klara Leo Mina Nils Olga Pavel",
}
_CHOICES = {slot: words.split() for slot, words in _WORDS.items()}
_LINES = {
    "poem": """O {adj} {topic} of {time}, you {verb} like a {noun},
The {noun} and the {noun} {verb} for {topic} again,
Beneath a {adj} {noun} the {adj} {topic} {verb},
And who but {name} would {verb} beside a {noun} at {time}?
At {time} the {adj} {noun} will {verb} and {verb},
Let {topic} {verb}, let every {noun} be {adj},""",
    "riddle": """I am {adj} before {time} and {adj} behind it.
Give me a {noun} and I {verb}; take my {noun} and I {verb}.
No {adj} {noun} has ever seen me {verb}.
Both {name} and {name} guessed a {noun}, and both were wrong.
Where a {noun} would {verb}, I stay {adj}.
Ask the {topic}: at {time} they {verb} because of me.""",
    "letter": """Dear {name}, our {topic} {verb} whenever the {noun} is {adj}.
I have sent the {adj} {noun} and two of the {topic} with {name}.
Please come before {time}, and bring a {noun}.
Nobody here will {verb} until the {noun} is {adj} again.
Do you still {verb} when you see {topic} at {time}?
Ever your {adj} friend, {name}, who cannot {verb}.""",
    "news item": """Police found {topic} near a {adj} {noun} at {time}.
"We only {verb}," said {name}, a keeper of {topic}.
The {noun} has been {adj} since {name} began to {verb}.
Experts from the {noun} works expect more {topic} by {time}.
A {adj} crowd came to {verb} around the {noun}.
Neither the mayor nor {name} wished to {verb} about it.""",
    "diary entry": """Woke at {time} and heard the {topic} {verb}.
{name} gave me a {adj} {noun}, which I must not lose.
I tried to {verb}, but a {noun} fell on the {noun}.
Counted the {topic} twice: they are all {adj} today.
Tomorrow {name} and I will {verb} until {time}.
So {adj} a {noun} I have never seen.""",
    "fable": """Once some {topic} found a {adj} {noun} and began to {verb}.
"Why do you {verb}?" asked the {noun} at {time}.
The {adj} one among them could {verb}, but would not {verb}.
So the {topic} traded their {noun} for a {noun}.
By {time} even {name} the miller had to {verb}.
He who is {adj} needs no {noun}.""",
}
KINDS = tuple(_LINES)
_SIZE = 4


def request(kind: str, topic: str) -> str:
    """The user's request for a text."""
    return f"Write a {kind} about {topic}."


def text(kind: str, topic: str, rng: random.Random) -> str:
    """Four random lines of the kind in random order, filled with random words."""

    def word(slot: re.Match[str]) -> str:
        return topic if slot[1] == "topic" else rng.choice(_CHOICES[slot[1]])

    lines = rng.sample(_LINES[kind].split("\n"), _SIZE)
    return "\n".join(re.sub(r"\{(\w+)\}", word, line) for line in lines)
