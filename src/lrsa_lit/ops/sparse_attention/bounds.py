"""What kinds of numbers a value out of YAML is."""

from __future__ import annotations

from typing import TypeGuard


def is_integer(value: object) -> TypeGuard[int]:
    """Whether it is an integer; true and false are none."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_weight(value: object) -> TypeGuard[float]:
    """Whether it is a finite number >= 0."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < float("inf")
