"""Importance of layers or key-value heads from a file, and the share of a dense cache that settings allow."""

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
    """The largest allowed share of a dense cache at the end of a prompt of ``tokens``."""

    budget: float
    tokens: int

    @classmethod
    def of(cls, field: str, asked: Mapping[str, Any], *further: str) -> CacheShare:
        """Read ``{budget: 0.25, tokens: 4096}``; a UserError unless it has exactly these keys and ``further``."""
        needed = {"budget", "tokens", *further}
        check_setting(field, dict(asked), set(asked) == needed, f"settings with {', '.join(sorted(needed))}")
        share, tokens = asked["budget"], asked["tokens"]
        check_setting(f"{field}.budget", share, is_weight(share) and 0 < share <= 1, "above 0 and at most 1")
        check_setting(f"{field}.tokens", tokens, is_integer(tokens) and tokens >= 1, "an integer >= 1")
        return cls(share, tokens)

    @property
    def pairs(self) -> Fraction:
        """Pairs that heads may hold on average; exact for decimal shares, so that 0.1 of 20 tokens is 2."""
        return Fraction(str(self.budget)) * self.tokens


def read_ranking(field: str, path: str) -> Any:
    """A number per layer, or a list per layer with a number per key-value head. Higher numbers are more important.

    Args:
        field: the setting that names the file.
        path: a file of gates (a JSON list of lists, or one line of numbers per layer, separated by tabs or spaces), or
            the ``heads.json`` or ``layers.json`` of an ablation.

    Returns:
        The gates, unchecked, or ranks from an ablation: 1 for the best, decreasing to just above 0 for the last.

    Raises:
        UserError: the file cannot be read or has neither format.
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
        raise UserError(field, path, reason="holds neither gates nor the results of an ablation") from None
    except ValueError as error:
        raise UserError(field, path, reason=f"is neither JSON nor a table of numbers ({message_of(error)})") from None


def is_table(rows: Any) -> bool:
    """Whether it is a list of equally long, non-empty lists of finite numbers, one per layer."""
    if not (_is_list(rows) and rows and all(_is_list(row) and len(row) == len(rows[0]) > 0 for row in rows)):
        return False
    return all(_is_number(number) for row in rows for number in row)


def is_of_layers(numbers: Any) -> bool:
    """Whether it is a non-empty list of finite numbers, one per layer."""
    return _is_list(numbers) and bool(numbers) and all(map(_is_number, numbers))


def _of_ablation(found: Mapping[str, Any]) -> Any:
    """Ranks by the importance of each head, or of each layer."""
    if "worths" in found:
        if not is_table(found["worths"]):
            raise TypeError
        places = _places([worth for row in found["worths"] for worth in row])
        width = len(found["worths"][0])
        return [places[start : start + width] for start in range(0, len(places), width)]
    of_layers = {each["layer"]: each["fall"] for each in found["ranking"]}
    return _places([of_layers[layer] for layer in range(len(of_layers))])


def _places(worths: Sequence[float]) -> list[float]:
    """Ranks: 1 for the highest number, then decreasing; of equal numbers the earlier ranks higher."""
    if not all(map(_is_number, worths)):
        raise TypeError
    order = sorted(range(len(worths)), key=lambda index: -worths[index])
    places = {index: 1 - place / len(worths) for place, index in enumerate(order)}
    return [places[index] for index in range(len(worths))]


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < math.inf
