"""What a bar of a study may say."""

from __future__ import annotations

from typing import Any

from lrsa_lit.errors import UserError
from lrsa_lit.experiments.report.cells import measure_of
from lrsa_lit.study.checks import MEASURES
from lrsa_lit.study.plan import Study

_CELL, _SHARE = {"set", "row", "inference"}, {"set", "of_dense"}
_MUST = ({*_SHARE, "kept"}, {*_SHARE, "pairs"}, {*_CELL, "at_least"}, {*_CELL, "above", "p"})
_MAY = {"set", "measure"}
_MAY_OF_DENSE = {*_MAY, "reference", "reference_at_least"}


def check_bar(study: Study, name: str, bar: Any) -> None:
    """Refuse a bar whose keys do not fit together, or that names what the study does not have.

    Raises:
        UserError: such a bar.
    """
    where = f"{study.name}: bars.{name}"
    keys = set(bar) if isinstance(bar, dict) else set()
    if not any(must <= keys <= must | (_MAY_OF_DENSE if must >= _SHARE else _MAY) for must in _MUST):
        allowed = "; or ".join(", ".join(sorted(must)) for must in _MUST)
        given = ", ".join(map(str, keys)) or "none"
        raise UserError(where, reason=f"the keys {given} are not allowed; they must be {allowed}")

    def check(key: str, holds: bool, allowed: str) -> None:
        if not holds:
            raise UserError(f"{where}.{key}", bar[key], allowed)

    check("set", isinstance(bar["set"], str) and bar["set"] in study.data_sets, "one of data_sets")
    measure = bar.get("measure") or measure_of(study, bar["set"])
    if measure not in MEASURES:
        raise UserError(f"{where}.measure", measure, ", ".join(MEASURES))
    for key in ("kept", "pairs", "of_dense", "at_least", "p"):
        check(key, isinstance(bar.get(key, 0), int | float), "a number")
    reference, least = bar.get("reference", []), bar.get("reference_at_least", {})
    check("reference", _is_names(reference), "a list of rows")
    numbers = isinstance(least, dict) and all(isinstance(value, int | float) for value in least.values())
    check("reference_at_least", numbers and set(least) <= set(MEASURES), f"{', '.join(MEASURES)}, each with a number")
    rows, above = bar.get("row", []), bar.get("above", [])
    rows = [rows] if isinstance(rows, str) else rows
    check("row", _is_names(rows), "the name of a row, or a list of them")
    check("inference", isinstance(bar.get("inference", ""), str), "the name of an attention")
    pairs = isinstance(above, list) and all(_is_names(other) and len(other) == 2 for other in above)
    check("above", pairs, "a list of [row, inference]")
    for row in reference:
        study.row(row)
    for row, attention in [*((row, bar["inference"]) for row in rows), *above]:
        study.rule_of(study.row(row), attention, where)


def _is_names(given: Any) -> bool:
    return isinstance(given, list) and all(isinstance(name, str) for name in given)
