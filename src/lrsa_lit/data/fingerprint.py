"""Everything that decides a data set's examples, as parts of the cache key."""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import json
import sys
import uuid
from collections.abc import Iterable, Iterator, Mapping, Set
from pathlib import Path
from typing import TYPE_CHECKING

from lrsa_lit import chat_template
from lrsa_lit.errors import UserError
from lrsa_lit.evaluation import answer_scores
from lrsa_lit.io import sha256_of
from lrsa_lit.paths import resolve

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_NO_FILE = "no file "


def digest(parts: Mapping[str, object]) -> str:
    """A key of 16 hex digits: equal for equal project code and equal parts, which JSON must be able to encode."""
    text = json.dumps({**parts, "project": PROJECT}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def of_code(defined: type) -> str:
    """Digest of the source code of a class's whole package; call it when the class is defined.

    A class without a file, as in a notebook, gets a unique value: defining it again gives another one.
    """
    if defined.__module__.partition(".")[0] == __name__.partition(".")[0]:
        return PROJECT
    files = source_files(defined.__module__)
    return _of_contents(files) if files else f"{_NO_FILE}{uuid.uuid4().hex}"


def definitions(defined: type) -> list[str]:
    """The :func:`of_code` digests of a class and its bases, which store them as ``_definition``."""
    return [vars(base)["_definition"] for base in defined.__mro__ if "_definition" in vars(base)]


def is_of_files(*classes: type) -> bool:
    """Whether the code of all classes comes from files, so that its digests are the same in another process."""
    return not any(name.startswith(_NO_FILE) for defined in classes for name in definitions(defined))


def parameters(made: object, base: type, but: Set[str]) -> dict[str, object]:
    """The constructor arguments of an object and its bases up to ``base``, read from the attributes of those names.

    Names in ``but`` are left out.
    """
    classes = [each for each in type(made).__mro__ if issubclass(each, base)]
    names = {name for each in classes for name in inspect.signature(each.__init__).parameters}  # type: ignore[misc]
    return {name: getattr(made, name) for name in sorted(names - but - {"self", "kwargs"})}


def source_files(module: str) -> list[Path]:
    """The files whose code may affect a class's examples: its whole package, or its module if it has no package.

    For this project's own package, only the code of data sets, chat templates and answer scores counts.
    """
    top = module.partition(".")[0]
    if top == __name__.partition(".")[0]:
        return [*Path(__file__).parent.rglob("*.py"), Path(chat_template.__file__), Path(answer_scores.__file__)]
    file = Path(getattr(sys.modules.get(module), "__file__", None) or "")
    if not file.is_file():
        return []
    package = sys.modules.get(top)
    if hasattr(package, "__path__") and (init := getattr(package, "__file__", None)):
        return list(Path(init).parent.rglob("*.py"))
    # A package without an __init__.py may be spread over several folders: use the module's own folder.
    return list(file.parent.rglob("*.py")) if "." in module else [file]


def of_files(values: object) -> dict[str, str]:
    """Size and SHA-256 of every file named by a string in nested mappings and lists, as :func:`resolve` finds it."""
    return {name: f"{path.stat().st_size} {sha256_of(path)}" for name, path in _files(values)}


def of_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of the fast tokenizer's definition, chat template and end token, which decide a prompt's tokens."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    # The last call with padding=… or truncation=… left these; they are not properties of the tokenizer.
    backend.pop("padding"), backend.pop("truncation")
    parts = [backend, tokenizer.chat_template, str(tokenizer.eos_token)]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _of_contents(files: Iterable[Path]) -> str:
    return hashlib.sha256(repr(sorted((file.name, sha256_of(file)) for file in files)).encode()).hexdigest()


def _files(values: object) -> Iterator[tuple[str, Path]]:
    if isinstance(values, str):
        # Not every string is a path, and the reader of a missing file reports it.
        with contextlib.suppress(UserError):
            yield values, resolve(values)
    elif isinstance(values, Mapping | list | tuple):
        for value in values.values() if isinstance(values, Mapping) else values:
            yield from _files(value)


# Computed at import, because this process does not run code that is edited later.
PROJECT = _of_contents(source_files(__name__))
