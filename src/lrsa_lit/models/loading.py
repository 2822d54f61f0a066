"""What transformers loads, held to be whole: it draws weights that a folder lacks at random, and goes on."""

from __future__ import annotations

import contextlib
import logging
import os
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from lrsa_lit.errors import UserError, said

if TYPE_CHECKING:
    from transformers import PreTrainedModel

KEY = "model.backbone.source"

_log = logging.getLogger(__name__)


def pretrained(auto_class: Any, location: str, source: str, *, trust_remote_code: bool = False, **options: Any) -> Any:
    """What one of transformers' Auto classes loads.

    Args:
        auto_class: the class.
        location: a folder or hub name.
        source: what the user calls it.
        trust_remote_code: run code that comes with it.
        options: of ``from_pretrained``.

    Raises:
        UserError: it cannot be loaded.
    """
    try:
        return auto_class.from_pretrained(location, trust_remote_code=trust_remote_code, **options)
    except Exception as error:
        # No code of ours runs here, and the libraries raise whatever comes of files that contradict themselves.
        reason = said(error) or type(error).__name__
        if not trust_remote_code and "trust_remote_code" in reason:
            raise UserError(
                f"model.backbone.trust_remote_code: {source} comes with code of its own, which only this setting runs; "
                "set it if you trust that code"
            ) from error
        raise UserError(f"{KEY}: {source} cannot be loaded: {reason[:300]}") from error


def load_model(location: str, source: str, **options: Any) -> PreTrainedModel:
    """A causal language model all of whose weights come from its files.

    Args:
        location: a folder or hub name.
        source: what the user calls it.
        options: of :func:`pretrained`.

    Raises:
        UserError: it cannot be loaded, or weights are missing or have another shape.
    """
    from transformers import AutoModelForCausalLM

    with _without_table():
        model: PreTrainedModel
        model, info = pretrained(
            AutoModelForCausalLM, location, source, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    check_complete(info, source)
    return model


def check_complete(info: dict[str, Any], source: str) -> None:
    """Check what transformers says about a loading; weights for which the model has no place are logged.

    Args:
        info: of ``from_pretrained(..., output_loading_info=True)``, by name; tied weights count as present.
        source: what the user calls the model.

    Raises:
        UserError: weights are missing, have another shape or could not be converted.
    """
    missing, unexpected = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
    if missing:
        instead = f"; it holds {len(unexpected)} others, such as {unexpected[0]}" if unexpected else ""
        raise UserError(f"{KEY}: {source}: {len(missing)} weights are missing, such as {missing[0]}{instead}")
    if mismatched := sorted(info["mismatched_keys"]):
        name, held, needed = mismatched[0]
        raise UserError(
            f"{KEY}: {source}: {len(mismatched)} weights have another shape than its config.json says, such as {name}: "
            f"{tuple(held)} instead of {tuple(needed)}"
        )
    if info["error_msgs"]:
        raise UserError(f"{KEY}: {source} cannot be loaded: {said(ValueError(info['error_msgs'][0]))[:300]}")
    if unexpected:
        _log.warning("%s: %d weights have no place in the model, such as %s", source, len(unexpected), unexpected[0])


@contextlib.contextmanager
def system_errors() -> Iterator[None]:
    """Raise what the system says, a full disk for example, as an OSError: libraries in Rust have errors of their own.

    Raises:
        OSError: the system's error.
    """
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
    """Transformers shows a table of missing weights, of which :func:`check_complete` makes one line."""
    logger = logging.getLogger("transformers.modeling_utils")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
