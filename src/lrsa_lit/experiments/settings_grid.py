"""The points of a grid: read from the command line, and checked as the fits that they will be."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from lrsa_lit.errors import UserError, redacted, under
from lrsa_lit.experiments.settings import FitSettings

FLAG = "--grid"
_LOGGER = "trainer.logger"


class Point(NamedTuple):
    """One fit of a sweep.

    Attributes:
        values: the grid's settings and this point's values, as text.
        arguments: what follows ``lrsa fit``.
        config: the whole resolved config.
        digest: changes whenever the config does.
    """

    values: dict[str, str]
    arguments: list[str]
    config: dict[str, Any]
    digest: str

    @property
    def label(self) -> str:
        """As in ``model.lrsa.top_k=16 model.lrsa.lag_size=128``."""
        return " ".join(f"{key}={value}" for key, value in self.values.items())


def parse(axes: Sequence[str]) -> dict[str, list[str]]:
    """The values of each setting, from texts such as ``model.lrsa.top_k=16,32``; values are YAML.

    Raises:
        UserError: no axis, no or empty values, or something that stands twice.
    """
    if not axes:
        raise UserError(FLAG, reason="none is given; at least one KEY=VALUE,VALUE is needed")
    grid: dict[str, list[str]] = {}
    for axis in axes:
        key, _, text = axis.partition("=")
        if key in grid:
            raise UserError(FLAG, key, reason=f"stands twice; give all its values in one {FLAG}")
        if key.startswith(_LOGGER):
            raise UserError(FLAG, key, reason="is not allowed; the runs of a sweep stand in one store and experiment")
        values = _values(key, text)
        # YAML allows a comma at the end, which rather is a value that was forgotten.
        if not key or not values or text.rstrip().endswith(","):
            raise UserError(FLAG, axis, "KEY=VALUE,VALUE without empty values")
        if doubled := [value for value in values if values.count(value) > 1]:
            raise UserError(FLAG, key, reason=f"has the value {doubled[0]} twice; each must be another one")
        grid[key] = values
    return grid


def _values(key: str, text: str) -> list[str]:
    """The values of an axis; none where they cannot be read."""
    import yaml

    from lrsa_lit.yaml_file import check_bounds

    check_bounds(f"{FLAG}: {key}", f"[{text}]")
    try:
        return [value if isinstance(value, str) else json.dumps(value) for value in yaml.safe_load(f"[{text}]")]
    except (yaml.YAMLError, TypeError, ValueError):
        # JSON has neither dates nor sets, which are no settings either.
        return []


def points(grid: Mapping[str, Sequence[str]], arguments: Sequence[str], fit_settings: FitSettings) -> list[Point]:
    """All combinations, each parsed as its fit would be.

    Args:
        grid: values of each setting.
        arguments: what all fits share.
        fit_settings: the parser.

    Raises:
        UserError: a fit would refuse a point; none has run by then.
    """
    made = []
    for values in itertools.product(*grid.values()):
        chosen = dict(zip(grid, values, strict=True))
        own = [*arguments, *(part for key, value in chosen.items() for part in (f"--{key}", value))]
        config = fit_settings.complete(own)
        _check_rule(config["model"]["lrsa"])
        # Not of a password, which may be another one next time.
        digest = hashlib.sha256(redacted(json.dumps(config, sort_keys=True)).encode()).hexdigest()[:16]
        made.append(Point(chosen, own, config, digest))
    return made


def _check_rule(settings: Mapping[str, Any]) -> None:
    """Check the bounds that depend on each other, which are the rule's own to check."""
    from lrsa_lit.attention import LRSAConfig

    with under("model.lrsa"):
        LRSAConfig(**{name: value for name, value in settings.items() if name != "compressor"})
