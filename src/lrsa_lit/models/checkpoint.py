"""A fit's checkpoint as a model: the backbone, the rule and the trained weights that it holds."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lrsa_lit.chat_template import with_arguments
from lrsa_lit.errors import UNREADABLE, UserError, said
from lrsa_lit.models.backbone import Backbone, LoRA
from lrsa_lit.models.rope import RopeScaling

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedTokenizerBase

SUFFIX = ".ckpt"
_KEY = "lrsa_lit"
_PREFIX = "model."
"""Where LongContextQA keeps the LLM among its weights."""


class Trained(NamedTuple):
    """What a checkpoint says about its model.

    Attributes:
        backbone: where the base LLM comes from, with the adapters that were trained.
        rule: the LRSAConfig that it was trained with, as a dict; None where it was trained densely.
        weights: all weights, or those of the adapters; None for the base LLM's own.
        template_arguments: arguments of the chat template.
    """

    backbone: Backbone
    rule: dict[str, Any] | None
    weights: dict[str, Tensor] | None
    template_arguments: dict[str, Any] = {}  # noqa: RUF012 - read only

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The backbone's tokenizer, with the template arguments."""
        return with_arguments(self.backbone.tokenizer, self.template_arguments)

    def build(self, *, dequantize: bool = False) -> nn.Module:
        """The model with the trained weights, in training mode.

        Args:
            dequantize: as :meth:`Backbone.build` has it.
        """
        model = self.backbone.build(dequantize=dequantize)
        if self.weights is not None:
            unknown = model.load_state_dict(self.weights, strict=self.backbone.lora is None).unexpected_keys
            if unknown:
                raise UserError(f"model: its adapters have no place in {self.backbone.source}, such as {unknown[0]}")
        return model


def describe(
    checkpoint: dict[str, Any],
    backbone: Backbone,
    rule: dict[str, Any] | None,
    template_arguments: dict[str, Any] = {},  # noqa: B006 - read only
) -> None:
    """Write into a checkpoint what :func:`load_trained` needs beside the weights."""
    checkpoint[_KEY] = {
        "backbone": dataclasses.asdict(backbone),
        "rule": rule,
        "template_arguments": template_arguments,
    }


def load_trained(path: Path, dtype: Any = None) -> Trained:
    """Read a checkpoint that a fit has written.

    Args:
        path: the file, or the folder of a sharded checkpoint.
        dtype: dtype to load the weights in; None: that of the training.

    Raises:
        UserError: it is none, it is truncated, or it was written by an earlier version that described nothing.
    """
    if not path.exists():
        raise UserError(f"model: {path}: no such file")
    try:
        checkpoint = _read(path)
        about, weights = checkpoint[_KEY], checkpoint["state_dict"]
    except UNREADABLE as error:
        reason = said(error)[:120]
        raise UserError(
            f"model: {path} is no checkpoint that a fit has written, or a truncated one ({reason})"
        ) from None
    # What only training has a use for.
    changes = {"gradient_checkpointing": False, "compile_layers": False} | ({} if dtype is None else {"dtype": dtype})
    return Trained(
        _backbone(about["backbone"] | changes),
        about["rule"],
        {name.removeprefix(_PREFIX): weight for name, weight in weights.items()},
        about.get("template_arguments", {}),
    )


def _read(path: Path) -> dict[str, Any]:
    import torch

    from lrsa_lit.models.sharding import WEIGHTS, read_meta, read_weights

    if path.is_dir():
        return {**read_meta(path), WEIGHTS: read_weights(path)}
    checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    return checkpoint


def _backbone(settings: dict[str, Any]) -> Backbone:
    """The backbone of a description, whose parts are dicts."""
    parts = {"lora": LoRA, "rope_scaling": RopeScaling}
    built = {name: kind(**settings[name]) for name, kind in parts.items() if settings.get(name) is not None}
    return Backbone(**settings | built)
