"""Selection with a gradient to the scores: in the backward pass, kept values are weighted by their scores.

Dimensions: B batch, H key-value heads, P partitions, L lag_size, K top_k, D head_dim.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lrsa_lit.bounds import check_setting, is_weight
from lrsa_lit.errors import UserError
from lrsa_lit.ops.sparse_attention.compressors import Compressor, LagRelative, Partitions, Selector, gather_kept

_LEAST_SPREAD = 1e-6
"""The least standard deviation of a partition's scores to divide by, so that rounding errors get no large gradient."""


@dataclass(frozen=True)
class StraightThrough(Selector):
    """Keep the pairs of another selector, with a gradient to the scores (straight-through, arXiv 1308.3432).

    The values of kept pairs are multiplied by 1 + s - sg(s), where sg stops the gradient. The output equals the other
    selector's bit for bit, and a score rises if a larger weight of its pair would lower the loss. Only training
    differs: it scores and gathers in PyTorch, which breaks the graph of compiled layers.

    Our choice of s is sigmoid((score - mean) / (temperature x standard deviation)), with mean and standard deviation
    over the partition, so s does not depend on the scale of the scores. A softmax over the partition would have one
    winner instead of K, and gradients that shrink as 1 / L.

    Args:
        of: the selector whose pairs are kept, or its dict from ``to_dict``.
        by: the selector whose score gets the gradient, likewise; null means ``of``. For example, ``of: RandomTokens``
            and ``by: LagRelative`` train a real score while random tokens are kept.
        temperature: a number > 0. With a small one only scores near the mean get a gradient.

    Raises:
        UserError: a setting is out of bounds, or the score ignores keys, values and queries.
    """

    of: Selector = field(default_factory=LagRelative)
    by: Selector | None = None
    temperature: float = 1.0

    def __post_init__(self) -> None:
        for name in ("of", "by"):
            given = getattr(self, name)
            if given is not None or name == "of":
                object.__setattr__(self, name, _selector(name, given))
        positive = is_weight(self.temperature) and self.temperature > 0
        check_setting("temperature", self.temperature, positive, "a finite number > 0")
        if self._scorer.constant:
            needed = "a selector whose score depends on keys, values or queries"
            raise UserError("by", type(self._scorer).__name__, needed, hint="such as by=LagRelative")
        object.__setattr__(self, "window", max(self.of.window, self._scorer.window))
        object.__setattr__(self, "needs_rotary", self.of.needs_rotary or self._scorer.needs_rotary)

    @property
    def _scorer(self) -> Selector:
        return self.of if self.by is None else self.by

    @property
    def plain(self) -> Selector:
        """The selector whose pairs are kept."""
        return self.of

    @property
    def shared_heads(self) -> bool:
        """Whether all heads keep the same tokens."""
        return any(getattr(one, "shared_heads", False) for one in (self.of, self._scorer))

    def score(self, partitions: Partitions) -> Tensor:
        """The scores by which pairs are kept."""
        return self.of.score(_for(self.of, partitions))

    def keep(self, partitions: Partitions) -> tuple[Tensor, Tensor]:
        """The choice of ``of``."""
        return self.of.keep(_for(self.of, partitions))

    def compress(self, partitions: Partitions) -> tuple[Tensor, Tensor]:
        """The kept pairs (B, H, P, K, D), with a gradient to the scores, too."""
        indices, _ = self.keep(partitions)
        key, value = gather_kept(partitions.key, indices), gather_kept(partitions.value, indices)
        if not torch.is_grad_enabled():
            return key, value
        soft = self.softened(partitions).gather(-1, indices)
        # Exactly 1, even if a score is not finite.
        scale = 1 + (soft - soft.detach()).nan_to_num()
        return key, (value.to(scale.dtype) * scale[..., None]).to(value.dtype)

    def softened(self, partitions: Partitions) -> Tensor:
        """The s of all tokens (B, H, P, L), from 0 to 1, at least float32, differentiable in the score's inputs."""
        scores = self._scorer.score(_for(self._scorer, partitions))
        spread = scores.std(dim=-1, correction=0, keepdim=True).clamp(min=_LEAST_SPREAD)
        return ((scores - scores.mean(dim=-1, keepdim=True)) / (self.temperature * spread)).sigmoid()

    def for_layer(self, layer: int) -> StraightThrough:
        """The same, with the selectors of that layer."""
        by = None if self.by is None else self.by.for_layer(layer)
        return dataclasses.replace(self, of=self.of.for_layer(layer), by=by)

    def for_heads(self, heads: tuple[int, ...]) -> StraightThrough:
        """The same, with the selectors of those heads."""
        by = None if self.by is None else self.by.for_heads(heads)
        return dataclasses.replace(self, of=self.of.for_heads(heads), by=by)


def _selector(name: str, given: Selector | dict[str, object] | str) -> Selector:
    made = given if isinstance(given, Compressor) else Compressor.from_dict(given, name)
    plain = isinstance(made, Selector) and made.plain is made and not made.takes_scores
    check_setting(name, type(made).__name__, plain, "a Selector other than StraightThrough and TokenGate")
    assert isinstance(made, Selector)
    return made


def _for(selector: Selector, partitions: Partitions) -> Partitions:
    """The partitions with only the queries of this selector's window; the other selector's may be larger."""
    query = partitions.next_query
    if query is None or query.shape[-2] == selector.window:
        return partitions
    window = selector.window
    return dataclasses.replace(partitions, next_query=query[..., -window:, :] if window else None)
