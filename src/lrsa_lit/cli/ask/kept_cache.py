"""``lrsa ask --cache PATH``: the cache of a text, saved for later commands that ask about it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lrsa_lit.cli.ask.dialogue import Dialogue
from lrsa_lit.errors import UserError, named

if TYPE_CHECKING:
    from lrsa_lit.attention import LRSACache
    from lrsa_lit.attention.cache_file import Saved

TEXT = "text"
"""The note with the text, so that FILE may be left out."""


def read_saved(path: str | None) -> Saved | None:
    """Read a cache file; None if it does not exist yet, a UserError if it is damaged or not a cache of a text."""
    if path is None or not Path(path).exists():
        return None
    from lrsa_lit.attention.cache_file import read

    with named("--cache"):
        saved = read(Path(path))
        if not isinstance(saved.header["notes"].get(TEXT), str):
            raise UserError("--cache", path, reason="was not made by lrsa ask; only its caches are allowed")
    return saved


def taken(saved: Saved, model: Any, dialogue: Dialogue) -> LRSACache:
    """The cache of a dialogue's text; a UserError if the file is from another model, rule or text."""
    from lrsa_lit.attention import LRSACache

    with named("--cache"):
        saved.check_tokens([dialogue.ids])
        return LRSACache.taken_from(saved, model)


def keep(path: str | None, model: Any, cache: Any, dialogue: Dialogue, text: str) -> None:
    """Save the cache of the text if a path is given."""
    if path is None:
        return
    try:
        cache.save(path, model, [dialogue.ids], {TEXT: text})
    except OSError as error:
        raise UserError("--cache", path, reason=f"cannot be written ({error.strerror})") from None
