"""Quick checks for mistyped keys and names and for missing files, before PyTorch is imported, which takes seconds.

The parser, or a part when it is built, refuses the same mistakes later. These checks know neither types nor the
settings of plugins' classes.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import yaml

from lrsa_lit.cli import catalogue, source_text
from lrsa_lit.data import kept_sources
from lrsa_lit.errors import UserError
from lrsa_lit.paths import PACKAGE_SCHEME, expanded, resolve, shipped
from lrsa_lit.yaml_file import read_settings

_GROUPS = ("model", "model.backbone", "model.lrsa", "trainer")
"""Groups of settings that the parser also reads from a file."""
_OF_CLASS = ("class_path", "init_args", "dict_kwargs")
_SPLITS = ("train", "val", "test")
_READ_NOTHING = ("--print_config", "--help")
LAST = "last"


def check(command: str, arguments: Sequence[str], *, plugins: bool) -> None:
    """Check the arguments of a run, but not the shipped defaults.

    Args:
        command: the run's command.
        arguments: what follows the command.
        plugins: whether the user's modules are loaded, whose classes have unknown names and settings.

    Raises:
        UserError: a key or a name is unknown, a file does not exist, or no model, data set or required setting is set.
    """
    state = _State(command, plugins)
    for origin, settings in _layers(arguments):
        try:
            state.take(settings)
        except UserError as error:
            if origin:
                raise UserError("--config", reason=f"{origin}: {error}") from None
            raise
    if not any(argument.startswith(_READ_NOTHING) or ".help" in argument for argument in arguments):
        state.check_required()
        state.check_files()


def _layers(arguments: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The name and settings of each file, and "" and the setting of each flag, in order."""
    for argument, following in zip_longest(arguments, arguments[1:], fillvalue=""):
        flag, assigned, value = argument.partition("=")
        value = value if assigned else following
        if flag in ("--config", "-c"):
            path = Path(value)
            yield value, read_settings(path if path.is_file() else _shipped(value))
        elif flag.startswith("--") and not flag.endswith(".help") and flag != "--plugins":
            yield "", _nested(flag.removeprefix("--").split("."), _value(value))


def _shipped(name: str) -> Path:
    return shipped(name if name.startswith("configs/") else f"configs/{name}")


def _value(text: str) -> Any:
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError):
        return text
    # YAML reads empty text as null, but only "null" and "~" set a flag to null.
    return text if value is None and text not in ("null", "~") else value


def _nested(names: Sequence[str], value: Any) -> dict[str, Any]:
    first, *rest = names
    return {first: _nested(rest, value) if rest else value}


class _State:
    """The settings so far: the class in each slot, and the values that are checked at the end."""

    def __init__(self, command: str, plugins: bool) -> None:
        self._command, self._plugins = command, plugins
        self._values: dict[str, Any] = {}
        self._classes: dict[str, str | None] = {}
        self._unread: set[str] = set()
        """Keys whose value is a file or an interpolation, which are not read here."""

    def take(self, settings: Mapping[str, Any]) -> None:
        """Check one layer of settings, and keep its values."""
        for name, value in settings.items():
            name = str(name).rstrip("+")
            _known("", name, catalogue.top_level(self._command), lambda: self._everywhere())
            self._descend(name, value)

    def check_required(self) -> None:
        """Refuse a run without a model, a data set, or a required setting of the data set."""
        if self._values.get("model.backbone.source") is None and not self._unread & {"model", "model.backbone"}:
            files = catalogue.setting_files("model.backbone.source", "model")
            raise UserError("model.backbone.source", reason="no model is named", hint=_named_by(files))
        if "data" not in self._classes and "data" not in self._unread:
            files = catalogue.setting_files("data.class_path", "data")
            raise UserError("data", reason="no data set is named", hint=_named_by(files, "configs/data/hotpotqa.yaml"))
        path = self._classes.get("data")
        for name, setting in catalogue.keys(path).items() if path else ():
            if setting.default is None and f"data.init_args.{name}" not in self._values:
                hint = _named_by(catalogue.setting_files(f"data.init_args.{name}", "data"))
                raise UserError(f"data.init_args.{name}", reason="is required", hint=hint)

    def check_files(self) -> None:
        """Refuse named files that do not exist, unless examples that were made from them are in the cache."""
        source = self._values.get("model.backbone.source")
        if isinstance(source, str) and (source.startswith(PACKAGE_SCHEME) or source.endswith(".gguf")):
            resolve(source, key="model.backbone.source")
        elif isinstance(source, str) and re.match(r"[.~/]", source):
            _exists("model.backbone.source", source, "a folder, a hub name, a GGUF file, package://…, or tiny")
        for name in (*_SPLITS, "source"):
            path, key = self._values.get(f"data.init_args.{name}"), f"data.init_args.{name}"
            if not isinstance(path, str) or "${" in path or not self._classes.get("data"):
                continue
            # The data set decides whether a folder is allowed, and whether what is cached of an absent file will do.
            if path.startswith(PACKAGE_SCHEME) or not expanded(key, path).is_dir():
                try:
                    resolve(path, key=key)
                except UserError:
                    if not kept_sources.are_kept(path):
                        raise
        checkpoint = self._values.get("ckpt_path")
        if isinstance(checkpoint, str) and checkpoint != LAST and "${" not in checkpoint:
            _exists("ckpt_path", checkpoint, f"a checkpoint written by a fit, or {LAST}")

    def _descend(self, key: str, value: Any) -> None:
        slot = "data" if key == "data" else key if key in catalogue.SLOTS else None
        part = catalogue.part_of(key)
        if slot is not None:
            for item in value if isinstance(value, list) else [value]:
                self._take_class(key, item)
        elif part is None or not isinstance(value, Mapping):
            self._values[key] = value
            if key in _GROUPS:
                self._unread.add(key)
        else:
            for name, inner in value.items():
                name = str(name).rstrip("+")
                _known(key, name, catalogue.keys(part), lambda: self._everywhere())
                self._descend(f"{key}.{name}", inner)

    def _take_class(self, key: str, value: Any) -> None:
        """Take a class by name or as a mapping, or arguments of the class that was named before."""
        if isinstance(value, str) and (os.path.exists(value) or "${" in value):
            self._unread.add(key)
            return
        given = {"class_path": value} if isinstance(value, str) else value
        if not isinstance(given, Mapping):
            return
        kind = catalogue.SLOTS[key]
        if (name := given.get("class_path")) is not None:
            self._classes[key] = self._named(key, kind, name)
        path = self._classes.get(key)
        arguments = given.get("init_args")
        arguments = dict(arguments) if isinstance(arguments, Mapping) else {}
        arguments |= {str(each): inner for each, inner in given.items() if each not in _OF_CLASS}
        for each, inner in arguments.items():
            if path is not None:
                name = each.partition(".")[0].rstrip("+")
                _known(f"{key}.init_args", name, source_text.settings(path), None)
            self._values[f"{key}.init_args.{each}"] = inner

    def _named(self, key: str, kind: str, name: object) -> str | None:
        """The path of a shipped class; None for other classes, such as those of plugins."""
        path = catalogue.class_of(kind, name)
        text = str(name)
        others = catalogue.added(kind)
        if path is None and not (self._plugins or "." in text or text in others):
            known = [*catalogue.named(kind), *others]
            nearest = difflib.get_close_matches(text, known, n=3, cutoff=0.5)
            hint = f"the nearest are {', '.join(nearest)}; " if nearest else ""
            mine = "--plugins MODULE (in YAML, plugins: [MODULE]) adds your own classes"
            raise UserError(key, reason=f"{text} is not a known class; {hint}{mine}")
        return path

    def _everywhere(self) -> Iterator[str]:
        """All keys, to find those nearest to a mistyped one."""
        yield from sorted(catalogue.top_level(self._command))
        for part in catalogue.parts():
            yield from (f"{part}.{name}" for name in catalogue.keys(str(catalogue.part_of(part))))


def _known(key: str, name: str, known: Iterable[str], everywhere: Callable[[], Iterable[str]] | None) -> None:
    """Refuse a name that is not known below a key.

    The message suggests the nearest whole keys of ``everywhere``, or if that is None the nearest known names.
    """
    if name in set(known):
        return
    full = f"{key}.{name}".lstrip(".")
    others = (name, known) if everywhere is None else (full, list(everywhere()))
    nearest = difflib.get_close_matches(*others, n=3, cutoff=0.4)
    raise UserError(full, reason=f"no such setting; the nearest are {', '.join(nearest) or 'shown by --help'}")


def _exists(key: str, path: str, allowed: str) -> None:
    if not path:
        raise UserError(key, path, allowed)
    if not expanded(key, path).exists():
        raise UserError(key, path, allowed, reason="does not exist")


def _named_by(files: Sequence[str], first: str = "configs/model/smollm2.yaml") -> str:
    """A hint to add the ``first`` of some shipped files, which also mentions the others."""
    if not files:
        return ""
    file = first if first in files else files[0]
    others = len(files) - 1
    more = f" (or one of {others} others that --help lists)" if others > 1 else f" (or {files[-1]})" if others else ""
    return f"add --config {file}{more}"
