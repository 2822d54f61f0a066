"""The attentions that settings ask for, as rules."""

from __future__ import annotations

import re
from collections.abc import Mapping

from lrsa_lit.attention import LRSAConfig
from lrsa_lit.attention.unread import check_read
from lrsa_lit.errors import UserError, under
from lrsa_lit.evaluation.each_layer import Attention, each_layer


def derived(field: str, own: LRSAConfig, changes: Attention) -> LRSAConfig | None:
    """The rule with some values changed, each of which must be read; None is dense. Errors name ``field``."""
    if changes is None:
        return None
    with under(field):
        check_read(changes, own.system)
        return own.replace(**changes)


def evaluated(own: LRSAConfig, further: Mapping[str, Attention]) -> dict[str, LRSAConfig | None]:
    """The rules to evaluate under, by name: the run's own as "", then the further ones."""
    rules: dict[str, LRSAConfig | None] = {"": own}
    for name, changes in each_layer("evaluate", further):
        if not (isinstance(name, str) and re.fullmatch(r"[\w-]+", name)):
            raise UserError("evaluate", name, "a name of letters, digits, - and _")
        if name in rules:
            raise UserError("evaluate", name, f"another name: {name.rpartition('-')[0]} stands for it as well")
        rules[name] = derived(f"evaluate.{name}", own, changes)
    return rules
