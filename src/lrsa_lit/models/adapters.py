"""Read LoRA adapters from a folder, as peft and this project write them."""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lrsa_lit.errors import UserError, message_of
from lrsa_lit.models.backbone import ADAPTER_CONFIG, Backbone, LoRA
from lrsa_lit.models.checkpoint import Trained, typed
from lrsa_lit.models.checkpoint_file import Unreadable, reason_of
from lrsa_lit.paths import expanded

if TYPE_CHECKING:
    from torch import Tensor

RULE_FILE = "lrsa.json"
"""The file with an adapter folder's rule. Whole models have the rule in config.json, but here that file would make the
folder look like a whole model."""

_WEIGHTS = "adapter_model.safetensors"
_KNOWN = {"peft_type", "task_type", "r", "lora_alpha", "lora_dropout", "target_modules", "base_model_name_or_path"}
# Settings that do not change trained adapters.
_KNOWN |= {"inference_mode", "revision", "peft_version", "auto_mapping", "init_lora_weights", "fan_in_fan_out"}
_DEFAULTS: tuple[Any, ...] = (None, False, [], {}, "none")


def holds_adapters(folder: Path) -> bool:
    """Whether a folder holds adapters instead of a whole model; a UserError if the path is invalid."""
    folder = expanded("model", folder)
    return (folder / ADAPTER_CONFIG).is_file() and not (folder / "config.json").is_file()


def check_holdable(backbone: Backbone) -> None:
    """Raise a UserError if a folder of adapters cannot represent all that the model was trained with."""
    if backbone.rope_scaling is not None:
        # Loading the adapters uses the base model's positions.
        reason = "a folder of adapters cannot hold the scaled positions; export the merged model"
        raise UserError("rope_scaling", reason=reason)
    if backbone.low_rank is not None or backbone.has_factors:
        # peft would apply the adapters to the whole projections, and skip those for modules that do not exist.
        reason = "a folder of adapters cannot hold low-rank factors; export the merged model"
        raise UserError("low_rank", reason=reason)


def load_adapters(folder: Path, dtype: Any = None, *, trust_remote_code: bool = False) -> Trained:
    """The trained model of an adapter folder, as ``lrsa export --adapters`` writes it: base model, adapters and rule.

    Args:
        folder: the folder. It names the base model, which is loaded later, when it is needed.
        dtype: dtype to load the base model in; None means float32.
        trust_remote_code: run the code that comes with the base model.

    Raises:
        UserError: it is not an adapter folder, is damaged, or holds adapters other than plain LoRA.
    """
    lora, weights = read_adapters(folder)
    base = _json(folder / ADAPTER_CONFIG).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise UserError("model", folder / ADAPTER_CONFIG, reason="has no base_model_name_or_path")
    rule = _json(folder / RULE_FILE) if (folder / RULE_FILE).is_file() else None
    options = {} if dtype is None else {"dtype": dtype}
    return Trained(Backbone(base, lora=lora, trust_remote_code=trust_remote_code, **options), rule, weights)


def read_adapters(folder: Path) -> tuple[LoRA, dict[str, Tensor]]:
    """The settings of an adapter folder, and its weights by their names in a model. Raises as :func:`load_adapters`."""
    import peft
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    config = _json(folder / ADAPTER_CONFIG)
    kind, task = config.get("peft_type"), config.get("task_type")
    if (kind, task) != ("LORA", "CAUSAL_LM"):
        reason = f"holds adapters of type {kind} for {task}; only LORA for CAUSAL_LM is supported"
        raise UserError("model", folder, reason=reason)
    for name, value in config.items():
        if name not in _KNOWN and value not in _DEFAULTS and value != getattr(peft.LoraConfig(), name, _DEFAULTS):
            reason = f"has {name} = {value!r}, which is not supported; merge them with peft"
            raise UserError("model", folder / ADAPTER_CONFIG, reason=reason)
    names = {"rank": "r", "alpha": "lora_alpha", "dropout": "lora_dropout", "target_modules": "target_modules"}
    try:
        lora = typed(LoRA, {ours: config.get(theirs) for ours, theirs in names.items()}, ADAPTER_CONFIG)
        weights = load_file(folder / _WEIGHTS)
    except (Unreadable, UserError, OSError, SafetensorError) as error:
        raise UserError("model", folder, reason=f"holds adapters that cannot be read ({reason_of(error)})") from error
    ours = functools.partial(re.sub, r"(\.lora_\w+)(?=\.weight$|$)", r"\1.default")
    return lora, {ours(name): weight for name, weight in weights.items()}


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError("model", path, reason=f"cannot be read ({message_of(error)[:120]})") from error
    if not isinstance(content, dict):
        raise UserError("model", path, reason="must contain a JSON object")
    return content
