"""A trained model as a folder that transformers loads: the weights, or the adapters, and the tokenizer."""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lrsa_lit.attention.rules import base_of

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

RULE_FILE = "lrsa.json"
"""Holds an adapter folder's rule. A config.json, which has it elsewhere, would pass for the one of a whole model."""


def save_folder(
    model: Any, tokenizer: PreTrainedTokenizerBase, folder: Path, *, weights: Mapping[str, Tensor] | None = None
) -> None:
    """Write a model and its tokenizer as ``AutoModelForCausalLM`` and ``AutoTokenizer`` load them.

    A ``PreTrainedModel`` becomes safetensors, config.json, with the rule it runs under as ``lrsa``, and its generation
    config. A ``PeftModel`` becomes its adapter, adapter_config.json, which names the base model, and, with LRSA
    enabled, :data:`RULE_FILE`. ``transformers`` loads either, ``peft`` the latter.

    Args:
        model: a ``PreTrainedModel`` or a ``PeftModel``.
        tokenizer: the model's.
        folder: appears only when it is complete, its parents are made; it must not exist.
        weights: weights to write instead of those that the model has now, under the names of its ``state_dict``.

    Raises:
        OSError: the folder exists or cannot be written; nothing is left behind.
    """
    from safetensors import SafetensorError

    if folder.exists():
        raise FileExistsError(f"{folder} exists")
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        with _with_cache(base_of(model).config):
            # peft would ask the hub whether the vocabulary has grown, which it never does here.
            options = {"save_embedding_layers": False} if _is_adapted(model) else {}
            model.save_pretrained(scratch, state_dict=None if weights is None else dict(weights), **options)
        if _is_adapted(model):
            _complete_adapter(model, scratch)
        tokenizer.save_pretrained(scratch)
        scratch.chmod(0o755)
        scratch.rename(folder)
    except SafetensorError as error:
        raise OSError(f"{folder} cannot be written ({error})") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _is_adapted(model: Any) -> bool:
    return base_of(model) is not model


def _complete_adapter(model: Any, folder: Path) -> None:
    """Name a base model in a local folder wherever the adapter is loaded from, and write the rule."""
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    base = Path(config["base_model_name_or_path"] or "")
    if base.name and base.is_dir():
        config["base_model_name_or_path"] = str(base.resolve())
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    rule = getattr(base_of(model).config, "lrsa", None)
    if rule is not None:
        (folder / RULE_FILE).write_text(json.dumps(rule, indent=2) + "\n", encoding="utf-8")


@contextlib.contextmanager
def _with_cache(config: Any) -> Iterator[None]:
    """Gradient checkpointing switched the cache off, which who loads the folder to generate wants on."""
    before, config.use_cache = config.use_cache, True
    try:
        yield
    finally:
        config.use_cache = before
