"""Load models with transformers and check that they are complete: transformers draws missing weights at random."""

from __future__ import annotations

import contextlib
import copy
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lrsa_lit.errors import UserError, message_of

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

_MOST_LAYERS = 10_000
_NUMBER = re.compile(r"\.\d+\.")
_log = logging.getLogger(__name__)


def pretrained(auto_class: Any, location: str, source: str, *, trust_remote_code: bool = False, **options: Any) -> Any:
    """Load by one of transformers' Auto classes from a folder or hub name; errors become a UserError of ``source``."""
    # A mistyped path looks like a hub name.
    missing = "" if os.path.exists(location) else "is not a folder here and "
    with _in_one_line(source, missing):
        return auto_class.from_pretrained(location, trust_remote_code=trust_remote_code, **options)


def from_config(config: PreTrainedConfig, source: str, **options: Any) -> PreTrainedModel:
    """A causal language model with random weights from transformers; a UserError for an invalid config."""
    from transformers import AutoModelForCausalLM

    layers = getattr(config.get_text_config(), "num_hidden_layers", 1)
    if isinstance(layers, int) and not 1 <= layers <= _MOST_LAYERS:
        reason = f"has num_hidden_layers {layers!r}, which must be from 1 to {_MOST_LAYERS}"
        raise UserError("source", source, reason=reason)
    with _in_one_line(source):
        return AutoModelForCausalLM.from_config(config, **options)  # type: ignore[no-any-return]


def load_model(location: str, source: str, **options: Any) -> PreTrainedModel:
    """A causal language model with all weights from its files; a UserError if some are missing or do not fit."""
    from transformers import AutoModelForCausalLM

    if "config" in options:
        _check_size(options["config"], location, source, options.get("trust_remote_code", False))
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
    with _without_table():
        model, info = pretrained(AutoModelForCausalLM, location, source, **options)
    check_complete(info, source)
    # Other weights, such as a value head, may be left out.
    known = {_NUMBER.sub(".N.", name) for name in model.state_dict()}
    if left_out := sorted(name for name in info["unexpected_keys"] if _NUMBER.sub(".N.", name) in known):
        layers = f"has weights of more layers than its config.json, such as {left_out[0]}"
        raise UserError("source", source, reason=f"{layers}; num_hidden_layers does not fit")
    return model  # type: ignore[no-any-return]


def check_complete(info: dict[str, Any], source: str) -> None:
    """Raise a UserError if weights are missing or have another shape; log those that the model does not use.

    ``info`` comes from ``from_pretrained(..., output_loading_info=True)``; tied weights count as present.
    """
    missing, unexpected = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
    reason = ""
    if missing:
        instead = f"; it holds {len(unexpected)} others, such as {unexpected[0]}" if unexpected else ""
        reason = f"lacks {len(missing)} weights, such as {missing[0]}{instead}"
    elif mismatched := sorted(info["mismatched_keys"]):
        name, held, needed = mismatched[0]
        shapes = f"such as {name}: {tuple(held)} instead of {tuple(needed)}"
        reason = f"has {len(mismatched)} weights of another shape than its config.json says, {shapes}"
    elif info["error_msgs"]:
        reason = f"cannot be loaded: {message_of(ValueError(info['error_msgs'][0]))[:300]}"
    if reason:
        raise UserError("source", source, reason=reason)
    if unexpected:
        _log.warning("%s: the model does not use %d weights, such as %s", source, len(unexpected), unexpected[0])


def _check_size(config: PreTrainedConfig, location: str, source: str, trust_remote_code: bool) -> None:
    """Refuse a config whose model is far larger than its files; transformers would allocate its memory first."""
    import torch

    files = [path for path in Path(location).glob("*") if path.suffix in (".safetensors", ".bin") and path.is_file()]
    if not files:
        return
    with torch.device("meta"):
        needed = from_config(copy.deepcopy(config), source, trust_remote_code=trust_remote_code).num_parameters()
    # No quantisation needs less than one bit per weight.
    if needed > 8 * sum(path.stat().st_size for path in files):
        reason = f"has a config.json that asks for {needed:,} weights, more than its files hold"
        raise UserError("source", source, reason=reason)


@contextlib.contextmanager
def _in_one_line(source: str, missing: str = "") -> Iterator[None]:
    """Turn any exception of a library into a UserError: none of our code runs inside, and files fail in many ways."""
    try:
        yield
    except Exception as error:
        reason = message_of(error) or type(error).__name__
        if "trust_remote_code" in reason:
            reason = "comes with its own code, which runs only with this setting; set it if you trust the code"
            raise UserError("trust_remote_code", source, reason=reason) from error
        raise UserError("source", source, reason=f"{missing}cannot be loaded: {reason[:300]}") from error


@contextlib.contextmanager
def system_errors() -> Iterator[None]:
    """Raise system errors, such as a full disk, as an OSError: libraries written in Rust raise other exceptions."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        if (found := re.search(r"\(os error (\d+)\)", str(error))) is None:
            raise
        raise OSError(int(found[1]), os.strerror(int(found[1]))) from error


@contextlib.contextmanager
def _without_table() -> Iterator[None]:
    """Hide transformers' table of missing weights; :func:`check_complete` reports them in one line."""
    logger = logging.getLogger("transformers.modeling_utils")
    # With a level instead of a filter, transformers would report which layers tensor parallelism does not shard.
    logger.addFilter(_is_error)
    try:
        yield
    finally:
        logger.removeFilter(_is_error)


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR
