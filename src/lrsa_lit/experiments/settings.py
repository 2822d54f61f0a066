"""Settings in the words of ``lrsa fit``, and what experiments need of its parser."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypeVar

Settings = dict[str, Any]
Made = TypeVar("Made")


class FitSettings(Protocol):
    """The parser of ``lrsa fit``; the command line has one."""

    def given(
        self, arguments: Sequence[str], overlays: Sequence[Mapping[str, Any]] = (), *, defaults: bool = False
    ) -> Settings:
        """What the shipped defaults, arguments and overlays say, or all settings of a fit."""

    def made(self, key: str, kind: type[Made], settings: Mapping[str, Any]) -> Made:
        """The object that settings describe; errors begin with ``key``."""


def digest(values: Any) -> str:
    """Twelve hex digits of plain values, whatever the order of their keys."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]
