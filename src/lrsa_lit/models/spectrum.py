"""Linear layers with trained scores for their singular values, after SoCo (arXiv 2502.15092).

W = U diag(sigma) V^T becomes U diag(sigma s) V^T with scores s from 0 to 2, which start at 1. Components with small
scores are removed, whatever their singular values; the scores of the others compensate. How scores are parametrised and
where the deviation is added is our choice, because the parts of the paper available to us do not say.

Dimensions: n inputs, m outputs, G separately decomposed blocks of outputs, R <= min(n, m / G) components of a block.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import linear


class SpectrumLinear(nn.Module):
    """x -> U diag(sigma s) V^T x + bias + deviation; only the scores s and the deviation are trained.

    Attributes:
        logits: (G, R), at least float32, zero at first; s = 2 sigmoid(logits).
        deviation: (m,), at least float32, zero at first.
        left: (G, m / G, R), U.
        sigma: (G, R), at least float32, descending.
        right: (G, R, n), V^T.
        kept: (G, R), 1 for components in use and 0 for others; None uses all.
        untouched: whether it computes the original layer, without scores and deviation.

    Args:
        layer: the original layer; factors get the dtype and device of its weight.
        blocks: G, a divisor of the number of outputs.
    """

    def __init__(self, layer: nn.Linear, blocks: int = 1) -> None:
        super().__init__()
        weight = layer.weight.detach()
        parts = weight.to("cpu", torch.float64).unflatten(0, (blocks, -1))
        left, sigma, right = torch.linalg.svd(parts, full_matrices=False)

        def frozen(value: Tensor, dtype: torch.dtype) -> nn.Parameter:
            # Parameters, because DDP would send buffers to all devices before each step.
            return nn.Parameter(value.to(weight.device, dtype), requires_grad=False)

        # In bfloat16 most updates would be rounded away.
        precise = torch.promote_types(weight.dtype, torch.float32)
        self.left, self.right, self.sigma = (
            frozen(left, weight.dtype),
            frozen(right, weight.dtype),
            frozen(sigma, precise),
        )
        self.bias = None if layer.bias is None else frozen(layer.bias.detach(), weight.dtype)
        self.logits = nn.Parameter(torch.zeros_like(self.sigma))
        self.deviation = nn.Parameter(torch.zeros(len(weight), dtype=precise, device=weight.device))
        self.kept: Tensor | None = None
        self.untouched = False

    @property
    def in_features(self) -> int:
        """Width of the input, n."""
        return self.right.shape[2]

    @property
    def out_features(self) -> int:
        """Width of the output, m."""
        return self.left.shape[0] * self.left.shape[1]

    @property
    def scores(self) -> Tensor:
        """s, (G, R) float32."""
        return scores_of(self.logits)

    def forward(self, x: Tensor) -> Tensor:
        """(…, n) -> (…, m)."""
        latent = linear(x, self.right.flatten(0, 1)).unflatten(-1, self.logits.shape)
        scale = self.sigma if self.untouched else self.sigma * self.scores
        if self.kept is not None and not self.untouched:
            scale = scale * self.kept
        left = self.left * scale.to(self.left.dtype)[:, None]
        output = torch.einsum("...gr,gmr->...gm", latent, left).flatten(-2)
        if self.bias is not None:
            output = output + self.bias
        return output if self.untouched else output + self.deviation.to(output.dtype)

    def extra_repr(self) -> str:
        """The shapes, for printing."""
        return f"in_features={self.in_features}, out_features={self.out_features}, blocks={len(self.left)}"


def scores_of(logits: Tensor) -> Tensor:
    """2 sigmoid(logits), which is 1 at 0, so that a new layer equals the original."""
    return 2 * torch.sigmoid(logits)


def counted(scores: Tensor, threshold: float, temperature: float) -> Tensor:
    """The degree to which each component counts as kept, in (0, 1): sigmoid((s - threshold) / temperature)."""
    return torch.sigmoid((scores - threshold) / temperature)


def ratio_of(counts: Sequence[Tensor], whole: int, cost: int = 1) -> Tensor:
    """The size of the kept components as a share of the original size.

    Args:
        counts: for each layer, the degree to which each component counts as kept.
        whole: the original size: numbers in a cache (outputs of all layers), or weights.
        cost: the size of a component: one number in a cache, or m + n weights.
    """
    return torch.stack([each.sum() for each in counts]).sum() * cost / whole


def undecided(counts: Sequence[Tensor]) -> Tensor:
    """Mean of p (1 - p) over components; 0 if each one is definitely kept or definitely removed."""
    return torch.cat([(each * (1 - each)).flatten() for each in counts]).mean()


def pruned(scores: Sequence[Tensor], layers: Sequence[int], threshold: float, most: int) -> list[Tensor]:
    """The components to keep of some matrices: those with scores above the threshold, up to a total number.

    If there are too many, those with the lowest scores are removed; ties remove the deeper layer first, then the higher
    index, then the later matrix. The component with the highest score in each block is always kept.

    Args:
        scores: (G, R) for each matrix.
        layers: the layer index of each matrix.
        threshold: scores must be above it.
        most: the most components of all matrices together; at least one per block.

    Returns:
        (G, R) bool on the CPU for each matrix.
    """
    flat = [each.detach().double().cpu() for each in scores]
    keep = [each > threshold for each in flat]
    first = [each == each.amax(dim=1, keepdim=True) for each in flat]
    # Of equal scores only the first.
    first = [each & (each.cumsum(dim=1) == 1) for each in first]
    keep = [each | of_block for each, of_block in zip(keep, first, strict=True)]
    excess = sum(int(each.sum()) for each in keep) - most
    if excess > 0:
        places = [(each & ~of_block).nonzero() for each, of_block in zip(keep, first, strict=True)]
        matrix = np.repeat(np.arange(len(flat)), list(map(len, places)))
        place = torch.cat(places).numpy()
        found = torch.cat([each[at[:, 0], at[:, 1]] for each, at in zip(flat, places, strict=True)]).numpy()
        order = np.lexsort((-place[:, 0], -matrix, -place[:, 1], -np.asarray(layers)[matrix], found))
        for number in order[:excess]:
            keep[matrix[number]][tuple(place[number])] = False
    return keep


def cut(layers: Iterable[SpectrumLinear], kept: Iterable[Tensor]) -> None:
    """Make layers use only some of their components, (G, R) bool for each layer."""
    for layer, of_layer in zip(layers, kept, strict=True):
        layer.kept = of_layer.to(layer.logits)


def whole_again(layers: Iterable[SpectrumLinear]) -> None:
    """Make layers use all their components again."""
    for layer in layers:
        layer.kept = None


def spectra_of(model: nn.Module) -> dict[str, SpectrumLinear]:
    """The layers of a model that have scores, by name, in the model's order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, SpectrumLinear)}


@contextlib.contextmanager
def without_scores(model: nn.Module) -> Iterator[None]:
    """Make all layers compute their original function in a with block."""
    layers = spectra_of(model).values()
    for layer in layers:
        layer.untouched = True
    try:
        yield
    finally:
        for layer in layers:
            layer.untouched = False
