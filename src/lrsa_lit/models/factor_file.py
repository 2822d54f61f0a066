"""Factors of low rank in a model's folder, beside their products, which transformers loads as ordinary weights."""

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


def read(folder: Path) -> dict[str, Tensor]:
    """The factors in a model's folder; a UserError if the file cannot be read."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(folder / FACTOR_FILE)
    except (OSError, SafetensorError) as error:
        raise UserError("source", folder / FACTOR_FILE, reason=f"cannot be read ({message_of(error)[:120]})") from None
