"""A linear layer factored in two. A cache may hold the narrow activation between them instead of the output.

Dimensions: d input width, w output width, G blocks of the output, R sum of the ranks of all blocks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

Factors = tuple[Tensor, Tensor]
"""A (d, r) and B (r, w / G) of one block: x A B is the block's part of x W."""


class LowRankLinear(nn.Module):
    """x -> (x A) B + bias. x A is the *latent* (…, R); each block of the output uses its own part of the latent.

    Both steps are ordinary ``nn.Linear`` layers, so adapters find them: ``down``, and in ``up`` one layer per block.

    Args:
        in_features: d.
        ranks: the rank of each block; their number G divides ``out_features``.
        out_features: w.
        bias: whether the output has a bias, which is stored in ``up``.
        like: the weights get the dtype and device of this tensor.
    """

    def __init__(
        self, in_features: int, ranks: Sequence[int], out_features: int, *, bias: bool, like: Tensor | None = None
    ) -> None:
        super().__init__()
        where = {} if like is None else {"dtype": like.dtype, "device": like.device}
        self.in_features, self.out_features, self.ranks = in_features, out_features, tuple(ranks)
        width = out_features // len(self.ranks)
        self.down = nn.utils.skip_init(nn.Linear, in_features, sum(self.ranks), bias=False, **where)
        self.up = nn.ModuleList(nn.utils.skip_init(nn.Linear, rank, width, bias=bias, **where) for rank in self.ranks)

    @classmethod
    @torch.no_grad()
    def of(cls, factors: Sequence[Factors], bias: Tensor | None = None, like: Tensor | None = None) -> LowRankLinear:
        """Make a layer from the factors of each block, in order, and the bias (w,) of the output.

        The weights get the dtype and device of ``like``, or of the first factor without it.
        """
        ranks = [left.shape[1] for left, _ in factors]
        width = sum(right.shape[1] for _, right in factors)
        like = factors[0][0] if like is None else like
        layer = cls(factors[0][0].shape[0], ranks, width, bias=bias is not None, like=like)
        layer.down.weight.copy_(torch.cat([left for left, _ in factors], dim=1).T)
        for block, (up, (_, right)) in enumerate(zip(layer.up, factors, strict=True)):
            assert isinstance(up, nn.Linear)
            up.weight.copy_(right.T)
            if bias is not None:
                up.bias.copy_(bias.unflatten(0, (len(factors), -1))[block])
        return layer

    def forward(self, x: Tensor) -> Tensor:
        """(…, d) -> (…, w)."""
        return self.read(self.down(x))

    def read(self, latent: Tensor) -> Tensor:
        """The output (…, w) for a latent (…, R)."""
        parts = latent.split(self.ranks, dim=-1) if len(self.ranks) > 1 else (latent,)
        read = [up(part) for up, part in zip(self.up, parts, strict=True)]
        return torch.cat(read, dim=-1) if len(read) > 1 else read[0]

    @torch.no_grad()
    def product(self) -> Tensor:
        """The weight (w, d) of the single linear layer that gives the same outputs."""
        down = self.down.weight.split(self.ranks)
        return torch.cat([up.weight @ part for up, part in zip(self.up, down, strict=True)])

    @property
    def bias(self) -> Tensor | None:
        """The bias (w,) of the output, or None."""
        found = [up.bias for up in self.up]
        return None if found[0] is None else torch.cat(found)  # type: ignore[arg-type, call-overload]

    def extra_repr(self) -> str:
        """The widths and ranks, for ``repr``."""
        return f"in_features={self.in_features}, ranks={self.ranks}, out_features={self.out_features}"
