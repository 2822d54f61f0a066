"""K of each layer or of each key-value head: read it, check it and average it."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from fractions import Fraction
from typing import Any

from lrsa_lit.attention.ranked_budgets import budgets_of
from lrsa_lit.bounds import check_setting, is_integer
from lrsa_lit.errors import UserError, message_of
from lrsa_lit.ops.sparse_attention import HeadRules, Rule
from lrsa_lit.paths import expanded

HeadTopK = tuple[int | tuple[int, ...], ...]
"""For each layer K, or K of each of its key-value heads."""
FIELD = "head_top_k"


def checked(given: Any, rule: Rule, dense_layers: Collection[int] = ()) -> HeadTopK:
    """K of each layer or head from a list, from the path of a JSON file, or from a ranking; null means the rule's K.

    Raises:
        UserError: the file cannot be read, the lists have another form, K is outside 0 … L, the compressor makes all
            heads keep the same tokens, or the share of the cache is below what is always kept.
    """
    values = _read(given) if isinstance(given, str) else given
    if isinstance(given, Mapping):
        values = budgets_of(FIELD, given, rule, dense_layers)
    allowed = (
        "a list with K of each layer, or with a list of K of its heads; the path of a JSON file with one; "
        "or {ranking: FILE, budget: SHARE, tokens: T}"
    )
    check_setting(FIELD, values, isinstance(values, list | tuple) and bool(values), allowed)
    heads = {len(layer) for layer in values if isinstance(layer, list | tuple)}
    if len(heads) > 1 or 0 in heads:
        raise UserError(FIELD, reason=f"has lists of {sorted(heads)} heads; all must have the same length")

    def one(where: str, value: Any) -> int:
        value = rule.top_k if value is None else value
        valid = is_integer(value) and 0 <= value <= rule.lag_size
        check_setting(f"{FIELD}.{where}", value, valid, f"an integer from 0 to lag_size ({rule.lag_size})")
        return int(value)

    budgets = tuple(
        tuple(one(f"{index}.{head}", value) for head, value in enumerate(layer))
        if isinstance(layer, list | tuple)
        else one(str(index), layer)
        for index, layer in enumerate(values)
    )
    for budget in budgets:
        with_budget(rule, budget)
    return budgets


def check_shape(budgets: HeadTopK, layers: int, heads: int | None) -> None:
    """Raise a UserError unless the budgets fit these numbers of layers and heads; None allows any number of heads."""
    given = next((len(layer) for layer in budgets if isinstance(layer, tuple)), None)
    if len(budgets) != layers or (None not in (given, heads) and given != heads):
        of_heads = "" if heads is None else f" x {heads} heads"
        has = f"{len(budgets)} layers" + ("" if given is None else f" x {given} heads")
        raise UserError(FIELD, reason=f"has K of {has}; the model has {layers} layers{of_heads}")


def heads_of(config: Any) -> int:
    """The number of key-value heads per layer, from a model's config."""
    text = config.get_text_config()
    return int(getattr(text, "num_key_value_heads", None) or text.num_attention_heads)


def with_budget(rule: Rule, budget: int | tuple[int, ...]) -> Rule | HeadRules | None:
    """The rule of a layer with its budget; None if the layer drops nothing."""
    different = {budget} if isinstance(budget, int) else set(budget)
    if len(different) > 1:
        assert isinstance(budget, tuple)
        return HeadRules(rule, budget)
    (top_k,) = different
    return None if top_k == rule.lag_size else rule.replace(top_k=top_k)


def mean_top_k(rule: Any, layers: int) -> Fraction:
    """K averaged over the heads of all layers; dense layers count as K = L.

    Args:
        rule: a config, or the dict that its ``to_dict`` returns.
        layers: the number of the model's layers.
    """
    values: dict[str, Any] = rule if isinstance(rule, dict) else rule.to_dict()
    budgets: Sequence[Any] = values.get(FIELD) or [values["top_k"]] * layers
    dense, lag_size = values["dense_layers"], values["lag_size"]
    means = [Fraction(layer) if is_integer(layer) else Fraction(sum(layer), len(layer)) for layer in budgets]
    return Fraction(sum(lag_size if index in dense else mean for index, mean in enumerate(means)), layers)


def _read(path: str) -> Any:
    try:
        return json.loads(expanded(FIELD, path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(FIELD, path, reason=f"cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise UserError(FIELD, path, reason=f"is not valid JSON ({message_of(error)})") from None
