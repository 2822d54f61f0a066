"""The files that prepared examples were made from, recorded beside them for machines that do not have these files."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path

from lrsa_lit import io
from lrsa_lit.cache_contents import SOURCES
from lrsa_lit.paths import cache_dir

_log = logging.getLogger("lrsa_lit.data")


def keep(path: Path, found: Mapping[str, str]) -> None:
    """Record the files that examples were made from: their contents' digests by their names.

    Raises:
        OSError: the record cannot be written.
    """
    io.write_atomically(path, lambda file: file.write(json.dumps(found, indent=1).encode()))


def with_absent(path: Path, found: Mapping[str, str]) -> dict[str, str]:
    """Add to the source files that were found those that :func:`keep` recorded and that are now absent.

    Examples made from absent files may still be in the cache: they were prepared on another machine, or before the
    files were removed.
    """
    kept = _read(path)
    for absent in kept.keys() - found.keys():
        _log.info("%s is absent; using the cached examples that were made from it", absent)
    return {**kept, **found}


def are_kept(name: str) -> bool:
    """Whether some examples in the cache were made from a file of this name, under whatever settings."""
    return any(name in _read(path) for path in cache_dir("data").glob(f"*{SOURCES}"))


def _read(path: Path) -> dict[str, str]:
    """A record; empty if there is none that can be read."""
    try:
        return {str(name): str(content) for name, content in json.loads(path.read_text()).items()}
    except (OSError, ValueError, AttributeError):
        return {}
