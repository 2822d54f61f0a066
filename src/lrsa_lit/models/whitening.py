"""Second moments of the inputs of a model's key and value projections: measure, write and read them.

Dimensions: N layers, T tokens of a context, d width of the hidden states.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lrsa_lit.attention import base_of
from lrsa_lit.errors import UserError, message_of
from lrsa_lit.io import write_atomically
from lrsa_lit.models.factors import projections

NAME = "input_moments"
"""The name of the tensor (N, d, d) in a file of moments."""


@torch.no_grad()
def measure(
    model: Any,
    contexts: Sequence[Sequence[int]],
    *,
    track: Callable[[Sequence[Sequence[int]]], Iterable[Sequence[int]]] = iter,
) -> Tensor:
    """The mean of x^T x (N, d, d) over all tokens of all contexts, float64 on the CPU; x (1, d) enters ``k_proj``.

    The same model and contexts give the same moments on the same kind of device. The model uses its current attention,
    and its weights do not change.

    Args:
        model: a causal language model, with or without adapters.
        contexts: the token ids of each context.
        track: an iterator over the contexts that shows progress.

    Raises:
        UserError: there are no tokens, or layers have no ``k_proj``.
    """
    count = sum(map(len, contexts))
    if not count:
        raise UserError("contexts", len(contexts), "at least one context with tokens")
    inner, training = base_of(model), model.training
    model.eval()
    try:
        with _sums(inner) as sums:
            for context in track(contexts):
                if context:
                    ids = torch.tensor([list(context)], device=inner.device)
                    model(input_ids=ids, use_cache=False, logits_to_keep=1)
    finally:
        model.train(training)
    return torch.stack(sums) / count


@contextlib.contextmanager
def _sums(model: Any) -> Iterator[list[Tensor]]:
    """Sums of x^T x (d, d) in each layer, collected in a with block."""
    layers: list[Any] = projections(model)
    found: list[Tensor] = [torch.zeros((), dtype=torch.float64, device="cpu")] * len(layers)

    def add(layer: int, module: Any, args: tuple[Tensor, ...]) -> None:
        rows = args[0].detach().flatten(0, -2).double()
        with torch.autocast(rows.device.type, enabled=False):
            found[layer] = found[layer] + (rows.T @ rows).cpu()

    def hook(layer: int) -> Callable[..., None]:
        return lambda module, args: add(layer, module, args)

    handles = [each.k_proj.register_forward_pre_hook(hook(layer)) for layer, each in enumerate(layers)]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def write(path: Path, moments: Tensor) -> None:
    """Write moments (N, d, d) as float32."""
    from safetensors.torch import save

    content = save({NAME: moments.float().contiguous()})
    write_atomically(path, lambda file: file.write(content))


def read(path: Path) -> Tensor:
    """The moments (N, d, d) in a file, float32; a UserError if there are none."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        found = load_file(path).get(NAME)
    except (OSError, SafetensorError) as error:
        raise UserError("low_rank.whitening", path, reason=f"cannot be read ({message_of(error)[:120]})") from None
    square = found is not None and found.ndim == 3 and found.shape[1] == found.shape[2]
    if found is None or not square or not found.is_floating_point() or not bool(found.isfinite().all()):
        hint = "write the file with `lrsa input-moments`"
        reason = f"has no tensor {NAME} (N, d, d) of finite numbers"
        raise UserError("low_rank.whitening", path, reason=reason, hint=hint)
    return found
