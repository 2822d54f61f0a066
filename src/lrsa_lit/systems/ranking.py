"""How much each layer or key-value head is worth, from a file, and the share of a cache that settings ask for."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

from lrsa_lit.bounds import check_setting, is_integer, is_weight
from lrsa_lit.errors import UserError, message_of
from lrsa_lit.paths import expanded


class CacheShare(NamedTuple):
    """A share of a dense cache that is not to be exceeded at the end of a prompt of so many tokens."""

    budget: float
    tokens: int

    @classmethod
    def of(cls, field: str, asked: Mapping[str, Any], *further: str) -> CacheShare:
        """Read ``{budget: 0.25, tokens: 4096}``; a UserError unless it has these settings and the further ones."""
        needed = {"budget", "tokens", *further}
        check_setting(field, dict(asked), set(asked) == needed, f"settings with {', '.join(sorted(needed))}")
        share, tokens = asked["budget"], asked["tokens"]
        check_setting(f"{field}.budget", share, is_weight(share) and 0 < share <= 1, "above 0 and at most 1")
        check_setting(f"{field}.tokens", tokens, is_integer(tokens) and tokens >= 1, "an integer >= 1")
        return cls(share, tokens)

    @property
    def pairs(self) -> Fraction:
        """Pairs that heads may hold on average: of the decimal share that was asked for, 0.1 of 20 tokens are 2."""
        return Fraction(str(self.budget)) * self.tokens


def read_ranking(field: str, path: str) -> Any:
    """Numbers of each layer, or of each layer a list with those of its key-value heads; higher ones are worth more.

    Args:
        field: the setting that names the file.
        path: of gates (a JSON list of lists, or a table of numbers between tabs or spaces with a line for each layer),
            or of the ``heads.json`` or ``layers.json`` that an ablation has left.

    Returns:
        The gates, whatever they are, or places in the ranking of an ablation: 1 for the best, above 0 for the last.

    Raises:
        UserError: the file cannot be read, or holds neither.
    """
    try:
        text = expanded(field, path).read_text(encoding="utf-8")
        if text.lstrip().startswith(("[", "{")):
            found = json.loads(text)
            return _of_ablation(found) if isinstance(found, dict) else found
        return [[float(word) for word in line.split()] for line in text.splitlines() if line.strip()]
    except OSError as error:
        raise UserError(field, path, reason=f"cannot be read ({error.strerror})") from None
    except UserError:
        raise
    except (KeyError, TypeError, RecursionError):
        raise UserError(field, path, reason="holds neither gates nor what an ablation has left") from None
    except ValueError as error:
        raise UserError(field, path, reason=f"is neither JSON nor a table of numbers ({message_of(error)})") from None


def is_table(rows: Any) -> bool:
    """Whether it has a list for each layer, all of as many finite numbers."""
    if not (_is_list(rows) and rows and all(_is_list(row) and len(row) == len(rows[0]) > 0 for row in rows)):
        return False
    return all(_is_number(number) for row in rows for number in row)


def is_of_layers(numbers: Any) -> bool:
    """Whether it has a finite number for each layer."""
    return _is_list(numbers) and bool(numbers) and all(map(_is_number, numbers))


def _of_ablation(found: Mapping[str, Any]) -> Any:
    """Places in the ranking by what each head is worth, or each layer."""
    if "worths" in found:
        if not is_table(found["worths"]):
            raise TypeError
        places = _places([worth for row in found["worths"] for worth in row])
        width = len(found["worths"][0])
        return [places[start : start + width] for start in range(0, len(places), width)]
    of_layers = {each["layer"]: each["fall"] for each in found["ranking"]}
    return _places([of_layers[layer] for layer in range(len(of_layers))])


def _places(worths: Sequence[float]) -> list[float]:
    """1 for the highest and less for each that follows, the earlier of equal ones before the later."""
    if not all(map(_is_number, worths)):
        raise TypeError
    order = sorted(range(len(worths)), key=lambda index: -worths[index])
    places = {index: 1 - place / len(worths) for place, index in enumerate(order)}
    return [places[index] for index in range(len(worths))]


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < math.inf
