"""``lrsa schema``: the JSON schema of a run's settings, with which editors complete and check YAML.

It is made from the parser. A file may set only some settings, so nothing is required. A number or a boolean may also be
an interpolation such as ``${model.lrsa.lag_size}``.
"""

from __future__ import annotations

import importlib
import itertools
import json
import pkgutil
from collections.abc import Mapping, Sequence
from typing import Any

from lrsa_lit import plugins
from lrsa_lit.cli import catalogue
from lrsa_lit.cli.arguments import Parser, add_plugins

FILE = "configs/schema.json"
"""The path of the shipped schema."""
_COMMANDS = ("fit", "validate", "test", "predict")
_TITLE = "Settings of lrsa fit, validate, test and predict"
_SCALARS = {"integer", "number", "boolean"}
_INTERPOLATION = {"type": "string", "pattern": r"\$\{"}
EPILOG = """\
The shipped schema is configs/schema.json. To make one that also has your classes:
  lrsa schema --plugins my_module > my-schema.json

An editor reads the schema that a comment in the YAML file names:
  # yaml-language-server: $schema=my-schema.json
"""


def run(arguments: Sequence[str]) -> None:
    """Print the schema.

    Raises:
        UserError: a plugin cannot be loaded.
    """
    parser = Parser("lrsa schema", description="Print the JSON schema of a run's settings.", epilog=EPILOG)
    add_plugins(parser)
    options = parser.parse_args(arguments)
    plugins.load(options.plugins)
    print(json.dumps(settings_schema(), indent=1, ensure_ascii=False))


def settings_schema() -> dict[str, Any]:
    """The schema of a file for ``--config``, with the settings of all commands."""
    from lrsa_lit.cli.lightning_cli import parser_of

    whole: dict[str, Any] = {"properties": {}, "$defs": {}}
    for command in _COMMANDS:
        made = _generator().generate(parser_of(command))
        whole["properties"] = made["properties"][command]["properties"] | whole["properties"]
        whole["$defs"] = made["$defs"] | whole["$defs"]
    trainer = whole["properties"]["trainer"]["properties"]
    # It adds to the list of other files.
    trainer["callbacks+"] = trainer["callbacks"]
    about = {"$schema": made["$schema"], "title": _TITLE, "type": "object", "additionalProperties": False}
    return about | dict(_relaxed(whole))


def _generator() -> Any:
    # Private to jsonargparse, and used only here.
    from jsonargparse._completions_jsonschema import ParserJsonschema, anyof_schema
    from lightning import Callback

    bases = {getattr(importlib.import_module(each.home), each.base): kind for kind, each in plugins.KINDS.items()}
    kinds: dict[type, str] = {Callback: "callbacks"} | bases

    class Generator(ParserJsonschema):  # type: ignore[misc]
        """Describes the classes of this project and of plugins; other classes may be named without a description."""

        def subclass_def(self, class_type: Any, action: Any) -> Any:
            known = _paths(kinds[class_type]) if class_type in kinds else _others(class_type)
            shapes = [self.class_path_schema(path, action) for path in known]
            for shape in shapes:
                # The command line sets the tokenizer.
                shape["properties"]["init_args"]["properties"].pop("tokenizer", None)
            names = [path.rpartition(".")[2] for path in known]
            other = self.unknown_class_path_schema()
            if known:
                other["properties"]["class_path"]["not"] = {"enum": [*names, *known]}
            named = [{"enum": names}] if names else []
            return anyof_schema([*named, {"type": "string"}, *shapes, other])

    return Generator()


def _others(class_type: Any) -> tuple[str, ...]:
    """This project's classes for a setting whose class is not of :data:`~lrsa_lit.plugins.KINDS`."""
    known = itertools.chain(*catalogue.OTHERS.values()) if isinstance(class_type, type) else ()
    return tuple(path for path in known if issubclass(pkgutil.resolve_name(path), class_type))


def _paths(kind: str) -> tuple[str, ...]:
    added = {} if kind == "callbacks" else plugins.added(kind)
    own = (f"{found.__module__}.{found.__qualname__}" for found in added.values())
    return (*catalogue.named(kind).values(), *own)


def _relaxed(schema: Any) -> Any:
    """Relax a schema: allow files with only some settings, short names of classes, and interpolations."""
    if isinstance(schema, list):
        return [_relaxed(each) for each in schema]
    if not isinstance(schema, Mapping):
        return schema
    # Files name their schema in a comment, so $schema is not a setting; the generator adds it to each mapping.
    found = {key: _relaxed(value) for key, value in schema.items() if key not in ("required", "default", "$schema")}
    if not isinstance(schema.get("default"), Mapping | None):
        found["default"] = schema["default"]
    named = found.get("properties", {}).get("class_path", {})
    if "not" in named:
        # Another class must be named: without a name, arguments are those of a known class.
        found["required"] = ["class_path"]
    elif "const" in named:
        path = named.pop("const")
        named["enum"] = [path.rpartition(".")[2], path]
    kinds = found.get("type")
    scalars = _SCALARS & set(kinds if isinstance(kinds, list) else [kinds])
    if scalars and "enum" not in found and "string" not in (kinds if isinstance(kinds, list) else ()):
        about = {key: found.pop(key) for key in ("description", "default") if key in found}
        return about | {"anyOf": [found, _INTERPOLATION]}
    return found
