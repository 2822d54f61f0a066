"""The file of low-rank factors in a model's folder; the ordinary weights next to it are the factors' products."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from lrsa_lit.errors import UserError, message_of
from lrsa_lit.models.low_rank import FACTOR_FILE

if TYPE_CHECKING:
    from torch import Tensor


def write(folder: Path, factors: Mapping[str, Tensor]) -> None:
    """Write factors into a model's folder."""
    from safetensors.torch import save_file

    save_file({name: weight.detach().cpu().contiguous() for name, weight in factors.items()}, folder / FACTOR_FILE)


def latent_bytes(folder: Path, heads: int, layers: int, pair: int, itemsize: int) -> float:
    """:meth:`~lrsa_lit.models.LowRank.latent_bytes` for the factors in a folder, without reading the weights.

    Args:
        folder: the model's folder.
        heads: key-value heads per layer.
        layers: number of layers.
        pair: bytes of a head's key and value, for layers without factors.
        itemsize: bytes per number.
    """
    from safetensors import safe_open

    with safe_open(folder / FACTOR_FILE, "pt") as file:
        shapes: dict[str, list[int]] = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 - it is no dict
    numbers = sum(shape[0] for name, shape in shapes.items() if name.endswith(".down.weight"))
    places = sum(".k_proj.up." in name and name.endswith(".weight") for name in shapes)
    factored = sum(name.endswith(".k_proj.down.weight") for name in shapes)
    return ((numbers * itemsize + 4 * places) / heads + (layers - factored) * pair) / layers


def read(folder: Path) -> dict[str, Tensor]:
    """The factors in a model's folder; a UserError if the file cannot be read."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(folder / FACTOR_FILE)
    except (OSError, SafetensorError) as error:
        raise UserError("source", folder / FACTOR_FILE, reason=f"cannot be read ({message_of(error)[:120]})") from None
