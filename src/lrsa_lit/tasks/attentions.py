"""Build the rules of the attentions in settings, and check them."""

from __future__ import annotations

import contextlib
import inspect
import re
from collections.abc import Collection, Iterable, Iterator, Mapping

from lrsa_lit.attention import LRSAConfig
from lrsa_lit.attention.unread import check_read
from lrsa_lit.errors import UserError, under
from lrsa_lit.evaluation.each_layer import Attention, each_layer
from lrsa_lit.ops.sparse_attention import ValueWeighted
from lrsa_lit.systems.icformer import ICFormer


def derived(field: str, own: LRSAConfig, changes: Attention) -> LRSAConfig | None:
    """The rule with some values changed, all of which must have an effect; None means dense. Errors name ``field``."""
    if changes is None:
        return None
    with under(field):
        check_read(changes, own.system)
        made = own.replace(**changes)
        if "value_weight" in changes:
            check_weight(made)
        return _without_digests(made)


def check_weight(rule: LRSAConfig) -> None:
    """Refuse a value weight that was set but that the compressor does not use.

    Raises:
        UserError: it is not 1, and the compressor has no value weight.
    """
    if rule.value_weight != 1 and rule.system is None and not isinstance(rule.compressor, ValueWeighted):
        reason = f"is not read by the compressor {type(rule.compressor).__name__}"
        raise UserError("value_weight", rule.value_weight, reason=reason, hint="leave one of them out")


def check_names(attentions: Collection[str], groups: Iterable[str]) -> None:
    """Raise a UserError if an attention has the name of a data set or task, because their metrics would collide."""
    if both := {group.partition("/")[0] for group in groups} & set(attentions):
        raise UserError("evaluate", min(both), "another name than those of the data sets and tasks")


def check_layers(rules: Mapping[str, LRSAConfig | None], count: int, heads: int | None) -> None:
    """Raise a UserError if a rule, named by its setting, uses layers or heads that the model does not have."""
    for field, rule in rules.items():
        if rule is not None:
            with under(field), of_system(rule):
                rule.layers.check(count, heads)


def needs_cache(rule: LRSAConfig | None) -> bool:
    """Whether a rule has a system that works only on a prompt in a cache, so that losses need one too."""
    return rule is not None and rule.system is not None and not rule.system.trains


def check_train(field: str, rule: LRSAConfig | None) -> None:
    """Raise a UserError if a rule has a system that models cannot be trained with."""
    if rule is not None and needs_cache(rule):
        raise UserError(field, type(rule.system).__name__, reason="is a system that cannot be trained with",
                        hint=f"model.{field}: null trains with dense attention")  # fmt: skip


def evaluated(own: LRSAConfig, further: Mapping[str, Attention]) -> dict[str, LRSAConfig | None]:
    """The rules to evaluate, by name: the run's own as "", then the further ones."""
    with under("lrsa"):
        check_weight(own)
        rules: dict[str, LRSAConfig | None] = {"": _without_digests(own)}
    for name, changes in each_layer("evaluate", further):
        if not (isinstance(name, str) and re.fullmatch(r"[\w-]+", name)):
            raise UserError("evaluate", name, "a name of letters, digits, - and _")
        if name in rules:
            raise UserError("evaluate", name, f"another name, because {name.rpartition('-')[0]} expands to it, too")
        rules[name] = derived(f"evaluate.{name}", own, changes)
    return rules


@contextlib.contextmanager
def of_system(rule: LRSAConfig | None) -> Iterator[None]:
    """In a with block, prefix errors about arguments of a rule's system with ``system.init_args``."""
    try:
        yield
    except UserError as error:
        system = None if rule is None else rule.system
        if system is not None and error.field.partition(".")[0] in inspect.signature(type(system)).parameters:
            error.field = f"system.init_args.{error.field}"
        raise


def _without_digests(rule: LRSAConfig) -> LRSAConfig:
    """The rule; a UserError if its system is the one that only digests may create."""
    if isinstance(rule.system, ICFormer):
        raise UserError("system", "ICFormer", reason="is created by digests", hint="set model.digests instead")
    return rule
