"""Render conversations by a model's chat template, and set the template's arguments."""

from __future__ import annotations

import contextlib
import copy
import json
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lrsa_lit.errors import UserError, message_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PASSED = ("messages", "tools", "documents", "add_generation_prompt")
"""Variables that ``apply_chat_template`` always passes, besides the special tokens."""
_GENERATION = re.compile(r"{%[-+]?\s*(?:end)?generation\s*[-+]?%}")
"""A block that transformers adds to Jinja; it uses no variables."""


def render(messages: Sequence[Mapping[str, str]], tokenizer: PreTrainedTokenizerBase, *, answering: bool = True) -> str:
    """The text of messages with a ``role`` and a ``content``, up to the start of the assistant's next message.

    If not ``answering``, the text ends with the last message.

    Raises:
        UserError: the chat template cannot be rendered, or raises an error.
    """
    try:
        return str(tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=answering))
    # A template is a program that comes with the model and can raise any error.
    except Exception as error:
        reason = message_of(error) or type(error).__name__
        raise UserError("tokenizer", reason=f"the chat template of {_name(tokenizer)} fails: {reason[:300]}") from error


def with_arguments(tokenizer: PreTrainedTokenizerBase, arguments: Mapping[str, Any]) -> PreTrainedTokenizerBase:
    """A tokenizer whose chat template has new defaults for its arguments.

    The defaults become part of the template's text, so they apply wherever the tokenizer or a saved copy is used:
    training, evaluation, cache keys and exported folders.

    Args:
        tokenizer: the tokenizer, which is not changed. If there are arguments, a copy is returned.
        arguments: values by name, of JSON types, as in ``{"enable_thinking": False}``.

    Raises:
        UserError: the template does not use an argument, or a value does not have a JSON type.
    """
    if not arguments:
        return tokenizer
    template: Any = tokenizer.chat_template
    default = template.get("default", "") if isinstance(template, dict) else template
    names = _argument_names(default, tokenizer)
    for name in arguments:
        if name not in names:
            has = ", ".join(sorted(names)) or "none"
            reason = f"the chat template of {_name(tokenizer)} has no such argument; it has {has}"
            raise UserError(f"template_arguments.{name}", reason=reason)
    # The templates are rendered with trim_blocks, which removes the line break after the last block.
    lines = (
        f"{{% if {name} is not defined %}}{{% set {name} = {_literal(name, value)} %}}{{% endif %}}\n"
        for name, value in arguments.items()
    )
    changed = "".join(lines) + default
    tokenizer = copy.copy(tokenizer)
    tokenizer.chat_template = template | {"default": changed} if isinstance(template, dict) else changed
    return tokenizer


def _argument_names(template: str, tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """Variables that a template reads and that only arguments can set."""
    import jinja2.meta
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"])
    try:
        used = jinja2.meta.find_undeclared_variables(environment.parse(_GENERATION.sub("", template)))
    except jinja2.TemplateError as error:
        reason = f"the chat template of {_name(tokenizer)} is not valid: {message_of(error)[:300]}"
        raise UserError("tokenizer", reason=reason) from error
    given = {*_PASSED, *tokenizer.special_tokens_map, *environment.globals, "raise_exception", "strftime_now"}
    return used - given


def _literal(name: str, value: Any) -> str:
    """A value in Jinja's syntax, which for JSON types is Python's."""
    with contextlib.suppress(TypeError, ValueError):
        if json.loads(json.dumps(value, allow_nan=False)) == value:
            return repr(value)
    allowed = "text, a number, true, false, null, or a list or mapping of them"
    raise UserError(f"template_arguments.{name}", value, allowed)


def _name(tokenizer: PreTrainedTokenizerBase) -> str:
    return tokenizer.name_or_path or "the model"
