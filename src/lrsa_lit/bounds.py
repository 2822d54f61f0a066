"""Checks of settings, which raise a UserError of one line."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeGuard, TypeVar

from lrsa_lit.errors import UserError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Settings = TypeVar("Settings", bound="DataclassInstance")


def is_integer(value: object) -> TypeGuard[int]:
    """Whether it is an integer; true and false do not count."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_weight(value: object) -> TypeGuard[float]:
    """Whether it is a finite number >= 0."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < float("inf")


def check_setting(name: str, value: object, valid: bool, allowed: str) -> None:
    """Raise a UserError with the setting's name and what it must be, unless its value is valid."""
    if not valid:
        raise UserError(name, value, allowed)


def check_integers(settings: object, least: int, *names: str) -> None:
    """Raise a UserError unless each of these attributes is an integer >= ``least``."""
    for name in names:
        value = getattr(settings, name)
        check_setting(name, value, is_integer(value) and value >= least, f"an integer >= {least}")


def check_counts(name: str, counts: Mapping[str, int], known: Sequence[str]) -> None:
    """Raise a UserError unless each key is known, and its value an integer >= 1."""
    for key, value in counts.items():
        check_setting(name, key, key in known, f"one of {', '.join(known)}")
        check_setting(f"{name}.{key}", value, is_integer(value) and value >= 1, "1 or more")


def replaced(settings: Settings, changes: dict[str, Any]) -> Settings:
    """A copy of a dataclass with other values; unknown names raise a UserError."""
    known = [item.name for item in dataclasses.fields(settings)]
    for name in changes:
        if name not in known:
            raise UserError(name, reason=f"no such setting; there are {', '.join(known)}")
    return dataclasses.replace(settings, **changes)
