"""K of each layer or head from a ranking and a cache share: the best are dense, the others have the rule's K.

Dimensions: N layers, H key-value heads per layer, T tokens of a prompt, L lag_size.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

from lrsa_lit.bounds import check_setting
from lrsa_lit.errors import UserError
from lrsa_lit.ops.sparse_attention import Rule, stored_size
from lrsa_lit.systems.ranking import CacheShare, is_of_layers, is_table, read_ranking


def budgets_of(field: str, asked: Mapping[str, Any], rule: Rule, dense_layers: Collection[int]) -> list[Any]:
    """K = L for as many of the best heads, or layers, as the share allows, and the rule's K for the others.

    The share counts the pairs of all heads at the end of a prompt, including sinks and windows. Heads in
    ``dense_layers`` come first, because they are dense in any case. Ties go to the earlier head.

    Args:
        field: name of the setting, for errors.
        asked: ``ranking``, the path of a file for :func:`~lrsa_lit.systems.ranking.read_ranking`; ``budget``, the
            share; ``tokens``, T.
        rule: the rule of the heads that are not dense.
        dense_layers: indices of the model's dense layers.

    Returns:
        N lists of H integers, or N integers if the file ranks layers.

    Raises:
        UserError: there are other keys, the file is not a ranking, the compressor holds more than pairs, or the share
            is too small even if only ``dense_layers`` are dense.
    """
    share = CacheShare.of(field, asked, "ranking")
    rows, of_layers = _ranking(f"{field}.ranking", asked["ranking"])
    if rule.compressor.has_bias or rule.compressor.window:
        reason = f"cannot be kept by {type(rule.compressor).__name__}, which holds more than pairs"
        raise UserError(f"{field}.budget", share.budget, reason=reason)
    places = [(layer, head) for layer, row in enumerate(rows) for head in range(len(row))]
    always = sum(layer in dense_layers for layer, _ in places)
    order = sorted(places, key=lambda place: (place[0] not in dense_layers, -rows[place[0]][place[1]]))
    held = stored_size(share.tokens, rule)
    if share.pairs * len(places) < always * share.tokens + (len(places) - always) * held:
        raise _below_floor(field, share, rule, always / len(places))
    # The extra pairs that a dense head holds, compared with any other head.
    more = share.tokens - held
    count = math.floor((share.pairs - held) * len(places) / more) if more else len(places)
    dense = set(order[:count])
    budgets = [
        [rule.lag_size if (layer, head) in dense else rule.top_k for head in range(len(row))]
        for layer, row in enumerate(rows)
    ]
    return [budget for (budget,) in budgets] if of_layers else budgets


def _ranking(field: str, path: Any) -> tuple[list[list[float]], bool]:
    """The ranking as a table, and whether it ranks whole layers."""
    check_setting(field, path, isinstance(path, str), "the path of a file")
    found = read_ranking(field, path)
    if is_of_layers(found):
        return [[number] for number in found], True
    if not is_table(found):
        raise UserError(field, path, reason="ranks neither layers nor heads")
    return found, False


def _below_floor(field: str, share: CacheShare, rule: Rule, dense: float) -> UserError:
    """The error that names the smallest possible share; ``dense`` is the share of heads in dense layers."""
    held = stored_size(share.tokens, rule)
    lowest = math.ceil(1e4 * (dense + (1 - dense) * held / share.tokens) - 1e-6) / 1e4
    least = f"at least {lowest:.4f} at {share.tokens} tokens, where K = {rule.top_k} holds {held} pairs per head"
    return UserError(f"{field}.budget", share.budget, least + (", and dense layers hold all" if dense else ""))
