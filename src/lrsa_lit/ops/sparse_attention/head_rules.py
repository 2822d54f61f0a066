"""Rules for a layer whose key-value heads keep different numbers of pairs. Heads with equal K attend as a group.

Dimensions: B batch, H key-value heads, Hq query heads, G of each key-value head, T tokens, D head_dim, K top_k.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lrsa_lit.errors import UserError
from lrsa_lit.ops.sparse_attention.kernel_code import kernel_code
from lrsa_lit.ops.sparse_attention.rule import KEEP_ALL, Rule

Attend = Callable[[Tensor, Tensor, Tensor, Rule], Tensor]
"""query, key and value of a group and its rule -> output, all (B, heads, T, D)."""


@dataclass(frozen=True)
class HeadGroups:
    """How the heads of a layer are split into groups.

    Adjacent heads of the same group form a run. Splitting returns a view for a group with a single run and copies for
    other groups; joining copies. Copies have the memory layout of a model, (B, T, heads, D).

    Args:
        heads: the key-value heads of each group, ascending. Each of 0 … H - 1 is in exactly one group.
    """

    heads: tuple[tuple[int, ...], ...]

    @functools.cached_property
    def count(self) -> int:
        """The number of key-value heads, H."""
        return sum(map(len, self.heads))

    @functools.cached_property
    def _runs(self) -> list[tuple[int, int]]:
        """The group and the number of heads of each run, starting with head 0."""
        owners = {head: group for group, heads in enumerate(self.heads) for head in heads}
        runs = itertools.groupby(owners[head] for head in range(self.count))
        return [(group, len(list(run))) for group, run in runs]

    def views(self, tensor: Tensor) -> list[list[Tensor]]:
        """Views of the runs of each group in a tensor (B, H or Hq, …)."""
        each = tensor.shape[1] // self.count
        groups: list[list[Tensor]] = [[] for _ in self.heads]
        runs = tensor.split([size * each for _, size in self._runs], dim=1)
        for (group, _), run in zip(self._runs, runs, strict=True):
            groups[group].append(run)
        return groups

    def split(self, tensor: Tensor) -> list[Tensor]:
        """The heads of each group in a tensor (B, H or Hq, T, D), differentiable."""
        return [_beside(runs) for runs in self.views(tensor)]

    def join(self, tensors: Sequence[Tensor]) -> Tensor:
        """Undo :meth:`split`: one tensor (B, H or Hq, T, D), differentiable."""
        if len(tensors) == 1:
            return tensors[0]
        each = tensors[0].shape[1] // len(self.heads[0])
        runs = [iter(tensor.split(self._sizes(group, each), 1)) for group, tensor in enumerate(tensors)]
        return _beside([next(runs[group]) for group, _ in self._runs])

    def join_into(self, whole: Tensor, tensors: Sequence[Tensor]) -> Tensor:
        """Like :meth:`join`, but into a given tensor (B, H or Hq, …), which is returned; not differentiable."""
        for views, tensor in zip(self.views(whole), tensors, strict=True):
            for view, run in zip(views, tensor.split([view.shape[1] for view in views], 1), strict=True):
                view.copy_(run)
        return whole

    def check(self, heads: int) -> None:
        """Raise a UserError unless these groups have ``heads`` key-value heads in all."""
        if heads != self.count:
            raise UserError("head_top_k", reason=f"has K of {self.count} heads; the layer has {heads}")

    def _sizes(self, group: int, each: int) -> list[int]:
        return [size * each for owner, size in self._runs if owner == group]


def _beside(runs: Sequence[Tensor]) -> Tensor:
    """Concatenate heads (B, heads, T, D); a single run is returned without a copy."""
    return runs[0] if len(runs) == 1 else torch.cat([run.transpose(1, 2) for run in runs], dim=2).transpose(1, 2)


@dataclass(frozen=True)
class HeadRules:
    """The rule of a layer whose key-value heads differ in K.

    Args:
        common: the rule of all heads, except for its K.
        top_k: K of each head, from 0 (sinks and raw window only) to L (dense).

    Raises:
        UserError: a K is out of bounds, or all heads must keep the same tokens by the compressor.
    """

    common: Rule
    top_k: tuple[int, ...]

    def __post_init__(self) -> None:
        """Check the compressor; making the rule of each group checks its K."""
        if getattr(self.common.compressor, "shared_heads", False):
            raise UserError("compressor.shared_heads", True, "false where heads differ in K")
        assert self.rules

    @functools.cached_property
    def groups(self) -> HeadGroups:
        """Groups of heads with equal K, ordered by their first heads."""
        return HeadGroups(
            tuple(
                tuple(head for head, other in enumerate(self.top_k) if other == top_k)
                for top_k in dict.fromkeys(self.top_k)
            )
        )

    @functools.cached_property
    def rules(self) -> tuple[Rule, ...]:
        """The rule of each group; for K = L it is dense attention."""
        return tuple(self._rule(heads) for heads in self.groups.heads)

    def _rule(self, heads: tuple[int, ...]) -> Rule:
        compressor = self.common.compressor.for_heads(heads)
        rule = self.common.replace(top_k=self.top_k[heads[0]], compressor=compressor)
        if rule.top_k < rule.lag_size:
            return rule
        return KEEP_ALL.replace(compressor=compressor) if compressor.takes_scores else KEEP_ALL

    def attend(self, attend: Attend, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attend in each group: queries (B, Hq, Tq, D), keys and values (B, H, T, D) -> (B, Hq, Tq, D)."""
        self.groups.check(key.shape[1])
        split = (self.groups.split(tensor) for tensor in (query, key, value))
        return self.groups.join([attend(*parts) for parts in zip(*split, self.rules, strict=True)])


def tensor_of_heads(rules: HeadRules) -> Tensor | None:
    """``tensor_of_rule`` of each head, (H, numbers); None if the compressor has no ``kernel_code``."""
    by_group = []
    for rule in rules.rules:
        code = kernel_code(rules.common.compressor, rule.top_k)
        if code is None:
            return None
        by_group.append((*rule.numbers, *code))
    rows = {head: row for heads, row in zip(rules.groups.heads, by_group, strict=True) for head in heads}
    with torch.inference_mode(False):
        return torch.tensor([rows[head] for head in range(len(rows))], dtype=torch.float64, device="cpu")


def groups_of_tensor(tensor: Tensor, heads: int) -> tuple[HeadGroups, list[list[float]]]:
    """The groups of ``heads`` key-value heads, and the numbers of each group's rule.

    Args:
        tensor: one rule for all heads (numbers,), or one per head (H, numbers).
        heads: H.

    Raises:
        UserError: the tensor has rules for another number of heads.
    """
    rows: list[list[float]] = [tensor.tolist()] * heads if tensor.ndim == 1 else tensor.tolist()
    if len(rows) != heads:
        raise UserError("rule_tensor", tuple(tensor.shape), f"a rule, or one for each of {heads} heads")
    found: dict[tuple[float, ...], list[int]] = {}
    for head, row in enumerate(rows):
        found.setdefault(tuple(row), []).append(head)
    return HeadGroups(tuple(map(tuple, found.values()))), list(map(list, found))
