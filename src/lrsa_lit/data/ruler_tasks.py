"""RULER's retrieval and tracing tasks in their original form: its needles, haystacks, sizes and prompts.

Source: Hsieh et al., "RULER: What's the Real Context Size of Your Long-Context Language Models?", COLM 2024 (arXiv
2404.06654), and its published code. RULER's prompts end with the beginning of the answer, which starts the assistant's
message here. A record's question fills the place of ``{query}``.

Differences from RULER: an essay starts at a random sentence and wraps around, while RULER always takes the first words.
A sentence ends at a word that ends with a full stop, question mark or exclamation mark, while RULER uses NLTK. No two
needles share a key or value. The words of keys contain only letters and no profanity.
"""

from __future__ import annotations

import random
import string
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice, pairwise

from lrsa_lit.data.prompts import Prompt
from lrsa_lit.data.records import Passage, QARecord
from lrsa_lit.data.sized import SizedTask
from lrsa_lit.data.word_tasks import WORD_TASKS, common_words, words_of

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
HOPS = 4

# Depths of needles, in percent of an essay's sentences.
_DEPTHS = [round(100 * number / 39) for number in range(40)]

_TRACK = "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
_TRACK_QUESTION = "\nQuestion: Find all variables that are assigned the value {input} in the text above."
# The spelling is RULER's.
_TRACK_ANSWER = (
    "Answer: According to the chain(s) of variable assignment in the text above, "
    f"{HOPS + 1} variables are assgined the value {{input}}, they are:"
)
# RULER's solved example has 500 tokens: ten lines of noise with about 25 tokens each.
_SOLVED_LINES = 10

Sentence = tuple[str, bool]
"""A sentence of a context, and whether it is a needle."""


@dataclass(frozen=True)
class Niah:
    """A needle-in-a-haystack task in RULER's terms.

    Attributes:
        haystack: "repeat" (lines of noise), "essay", or "needle" (needles of keys that are not asked for).
        keys: "words" or "uuids".
        values: "numbers" (7 digits) or "uuids".
        num_keys: number of keys of the needles; at least ``num_queries`` are used.
        num_values: number of values per key.
        num_queries: number of keys that are asked for.
    """

    haystack: str
    keys: str = "words"
    values: str = "numbers"
    num_keys: int = 1
    num_values: int = 1
    num_queries: int = 1

    @property
    def prompt(self) -> Prompt:
        """RULER's prompt, in the singular if one value is asked for."""
        one = self.num_queries * self.num_values == 1
        some, all_of, are = ("A", "is", "is") if one else ("Some", "are all", "are")
        kind = self.values.removesuffix("s") if one else self.values
        return Prompt(
            f"{some} special magic {kind} {are} hidden within the following text. Make sure to memorize it. "
            f"I will quiz you about the {kind} afterwards.\n{{context}}\n"
            f"What {all_of} the special magic {kind} for {{input}} mentioned in the provided text?",
            answer=f"The special magic {kind} for {{input}} mentioned in the provided text {are}",
            heading=None,
        )

    def make(self, words: Sequence[str], name: str, rng: random.Random, size: int, max_tokens: int) -> QARecord:
        """Make a record with an essay of ``size`` words from ``words``, or with ``size`` lines of another haystack.

        The answers are all values of the queried keys: the keys in the order of the question, each key's values in the
        order of the context. RULER defines no order; a fixed one makes the answers learnable.
        """
        keys, values = (_distinct(partial(_DRAWN[kind], rng)) for kind in (self.keys, self.values))
        number = max(self.num_keys, self.num_queries)
        held = list(islice(keys, number))
        pairs = [(key, next(values)) for key in held for _ in range(self.num_values)]
        rng.shuffle(pairs)
        asked = rng.sample(held, self.num_queries)
        if self.haystack == "essay":
            hay, between = essay(words, rng, size), " "
            places = [len(hay) * depth // 100 for depth in rng.sample(_DEPTHS, len(pairs))]
        else:
            # Draw the lines before the places, so that a larger record starts with the lines of a smaller one.
            of_needles = self.haystack == "needle"
            hay = [self._needle(next(keys), next(values)) if of_needles else NOISE for _ in range(size)]
            places, between = rng.sample(range(size), len(pairs)), "\n"
        needles = [self._needle(key, value) for key, value in pairs]
        passages = in_pieces(_hidden(needles, sorted(places), hay), between)
        return QARecord(
            id=name,
            passages=passages,
            question=asked[0] if len(asked) == 1 else f"{', '.join(asked[:-1])}, and {asked[-1]}",
            answers=tuple(value for key in asked for own, value in pairs if own == key),
            supporting_titles=tuple(f"Needle {place}" for place, (key, _) in enumerate(pairs, start=1) if key in asked),
            match="all",
        )

    def _needle(self, key: str, value: str) -> str:
        return f"One of the special magic {self.values} for {key} is: {value}."


NIAH = {
    "niah_single_1": Niah("repeat"),
    "niah_single_2": Niah("essay"),
    "niah_single_3": Niah("essay", values="uuids"),
    "niah_multikey_1": Niah("essay", num_keys=4),
    "niah_multikey_2": Niah("needle"),
    "niah_multikey_3": Niah("needle", keys="uuids", values="uuids"),
    "niah_multivalue": Niah("essay", num_values=4),
    "niah_multiquery": Niah("essay", num_queries=4),
}
SIZED_NAMES = (*NIAH, "vt", "cwe", "fwe")


def sized_tasks(words: Sequence[str]) -> dict[str, SizedTask]:
    """RULER's eleven tasks that grow with the budget, by RULER's names; ``words`` are the words of the essays."""
    _, smallest, prompt = WORD_TASKS["common_words"]
    return {
        **{name: SizedTask(partial(task.make, words), 1, task.prompt) for name, task in NIAH.items()},
        "vt": SizedTask(variable_tracking, HOPS + 2, Prompt("{context}" + _TRACK_QUESTION, _TRACK_ANSWER, None)),
        "cwe": SizedTask(partial(common_words, blank=""), smallest, prompt),
        "fwe": WORD_TASKS["frequent_words"],
    }


def variable_tracking(name: str, rng: random.Random, size: int, max_tokens: int) -> QARecord:
    """RULER's chain of assignments among ``size`` lines of noise: which variables hold the number of the first one?

    A solved example with 3-letter variables (instead of 5 letters) precedes the task.
    """
    variables, value, sentences = _chain(rng, 3, _SOLVED_LINES)
    asked = f"{_TRACK_QUESTION} {_TRACK_ANSWER}".replace("{input}", value)
    solved = f"{_TRACK}{' '.join(sentence for sentence, _ in sentences)}{asked}  {' '.join(variables)}\n\n\n\n"
    variables, value, sentences = _chain(rng, 5, size)
    pieces = in_pieces(sentences, " ")
    titles = tuple(piece.title for piece in pieces if piece.title)
    return QARecord(name, (Passage("", solved + _TRACK), *pieces), value, tuple(variables), titles, match="all")


def _chain(rng: random.Random, letters: int, lines: int) -> tuple[list[str], str, list[Sentence]]:
    """The variables of a chain, their value, and the text that hides it."""
    variables = list(islice(_distinct(lambda: "".join(rng.choices(string.ascii_uppercase, k=letters))), HOPS + 1))
    value = str(rng.randrange(10_000, 100_000))
    needles = [f"VAR {variables[0]} = {value}", *(f"VAR {new} = VAR {old} " for old, new in pairwise(variables))]
    return variables, value, _hidden(needles, sorted(rng.sample(range(lines), len(needles))), [f"{NOISE}\n"] * lines)


def _hidden(needles: Sequence[str], places: Sequence[int], hay: Sequence[str]) -> list[Sentence]:
    """Insert each needle before the haystack's sentence at its place; ``places`` must be ascending."""
    found: list[Sentence] = []
    start = 0
    for needle, place in zip(needles, places, strict=True):
        found += [*((sentence, False) for sentence in hay[start:place]), (needle, True)]
        start = place
    return [*found, *((sentence, False) for sentence in hay[start:])]


def in_pieces(sentences: Sequence[Sentence], between: str) -> tuple[Passage, ...]:
    """Split a text into passages for a prompt without headings: needles, titled "Needle 1" and so on, and the rest.

    ``between`` is the separator between any two sentences.
    """
    pieces: list[Passage] = []
    text, needles = "", 0
    for number, (sentence, is_needle) in enumerate(sentences):
        text += between if number else ""
        if is_needle:
            needles += 1
            pieces += [*([Passage("", text)] if text else []), Passage(f"Needle {needles}", sentence)]
        text = "" if is_needle else text + sentence
    return (*pieces, Passage("", text)) if text else tuple(pieces)


def essay(words: Sequence[str], rng: random.Random, size: int) -> list[str]:
    """The sentences of ``size`` consecutive words, starting at a random sentence and wrapping around."""
    drawn = rng.randrange(len(words))
    start = next((place for place in range(drawn, len(words)) if _ends(words[place - 1])), 0)
    sentences: list[list[str]] = [[]]
    for place in range(start, start + size):
        if sentences[-1] and _ends(sentences[-1][-1]):
            sentences.append([])
        sentences[-1].append(words[place % len(words)])
    return [" ".join(sentence) for sentence in sentences]


def _ends(word: str) -> bool:
    return word.rstrip("\"')]").endswith((".", "!", "?"))


def _distinct(draw: Callable[[], str]) -> Iterator[str]:
    seen: set[str] = set()
    while True:
        if (drawn := draw()) not in seen:
            seen.add(drawn)
            yield drawn


_DRAWN: dict[str, Callable[[random.Random], str]] = {
    "words": lambda rng: f"{rng.choice(words_of('adjective'))}-{rng.choice(words_of('noun'))}",
    "numbers": lambda rng: str(rng.randrange(10**6, 10**7)),
    "uuids": lambda rng: str(uuid.UUID(int=rng.getrandbits(128), version=4)),
}
