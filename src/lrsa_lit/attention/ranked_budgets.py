"""K of each layer or head by a ranking and a share of a dense cache: the best dense, the others with the rule's K.

Dimensions: N layers, H key-value heads of each, T tokens of a prompt, L lag_size.
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

    Counted are the pairs of all heads at the end of a prompt, sinks and windows included. Of equal heads the earlier
    are better; those of ``dense_layers`` are before all others, as they are dense anyhow.

    Args:
        field: the setting; errors begin with it.
        asked: ``ranking``, the path of a file for :func:`~lrsa_lit.systems.ranking.read_ranking`; ``budget``, the
            share; ``tokens``, T.
        rule: of the heads that are not dense.
        dense_layers: of the model.

    Returns:
        N lists of H integers, or N integers where layers are ranked.

    Raises:
        UserError: other settings, a file that ranks nothing, a compressor that holds more than pairs, or a share below
            what is held where no further head is dense.
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
    # A dense head takes T pairs in the place of those that any other holds.
    more = share.tokens - held
    count = math.floor((share.pairs - held) * len(places) / more) if more else len(places)
    dense = set(order[:count])
    budgets = [
        [rule.lag_size if (layer, head) in dense else rule.top_k for head in range(len(row))]
        for layer, row in enumerate(rows)
    ]
    return [budget for (budget,) in budgets] if of_layers else budgets


def _ranking(field: str, path: Any) -> tuple[list[list[float]], bool]:
    """The ranking as a table, and whether it is of whole layers."""
    check_setting(field, path, isinstance(path, str), "the path of a file")
    found = read_ranking(field, path)
    if is_of_layers(found):
        return [[number] for number in found], True
    if not is_table(found):
        raise UserError(field, path, reason="ranks neither layers nor heads")
    return found, False


def _below_floor(field: str, share: CacheShare, rule: Rule, dense: float) -> UserError:
    """What is held anyhow, as a setting; ``dense`` is the share of the dense layers."""
    held = stored_size(share.tokens, rule)
    lowest = math.ceil(1e4 * (dense + (1 - dense) * held / share.tokens) - 1e-6) / 1e4
    least = f"at least {lowest:.4f} at {share.tokens} tokens, where K = {rule.top_k} holds {held} pairs of a head"
    return UserError(f"{field}.budget", share.budget, least + (", and dense layers hold all" if dense else ""))
