"""The pages of the reference, made from the code: commands, settings, classes and shipped files."""

import contextlib
import io
import re
from collections.abc import Iterable, Iterator, Mapping

from lrsa_lit import plugins
from lrsa_lit.cli import catalogue, source_text
from lrsa_lit.cli.main import COMMANDS, TOOLS, main
from lrsa_lit.cli.source_text import Setting
from lrsa_lit.paths import shipped
from lrsa_lit.yaml_file import read_settings

PARTS = {
    "model": "The model and how it is trained and evaluated",
    "model.backbone": "The base LLM",
    "model.backbone.lora": "Adapters",
    "model.backbone.low_rank": "Keys and values of low rank",
    "model.backbone.rope_scaling": "More positions than the model was trained on",
    "model.lrsa": "The rule",
    "data": "Settings of every data set of questions",
    "trainer": "Lightning's Trainer",
}
KINDS = {
    "data": "Data sets",
    "filters": "Context filters",
    "compressors": "Compressors",
    "systems": "Systems",
    "objectives": "Objectives",
    "callbacks": "Callbacks",
}


def pages() -> Iterator[tuple[str, str]]:
    """Each page of the reference: where it is, and its text."""
    yield "reference/commands.md", "\n".join(_commands())
    yield "reference/settings.md", "\n".join(_settings())
    yield "reference/classes.md", "\n".join(_classes())
    yield "reference/configs.md", "\n".join(_configs())


def _commands() -> Iterator[str]:
    yield "# Commands\n"
    yield "What each command prints with `--help`. `lrsa fit --help-all` lists the options of Lightning as well.\n"
    for name, about in {"": "", **COMMANDS, **TOOLS}.items():
        yield f"## lrsa {name}".rstrip() + "\n"
        if about:
            yield f"{about[0].upper()}{about[1:]}.\n"
        yield f"```text\n{_help(name)}\n```\n"


def _help(command: str) -> str:
    """What a command prints for --help."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        main([*filter(None, [command]), "--help"])
    return printed.getvalue().rstrip()


def _settings() -> Iterator[str]:
    defaults = read_settings(shipped("cli.yaml"))
    yield "# Settings\n"
    yield (
        "Every key that YAML files and flags take, with its default. Later files and flags override earlier ones: "
        "`--model.lrsa.top_k 16` on the command line is `model: {lrsa: {top_k: 16}}` in YAML. What a chosen "
        "class takes (a data set, a compressor, an objective) is listed [by class](classes.md).\n"
    )
    yield "## Completion in editors\n"
    yield (
        "A comment in a YAML file names the JSON schema of the settings. Editors with the YAML language server (VS "
        "Code, Neovim, JetBrains) then complete keys, show what they do, and mark mistakes. Every shipped file has "
        "such a comment. `lrsa schema > schema.json` writes the schema for files of your own; `--plugins my_module` "
        "adds your classes.\n"
    )
    yield "```yaml\n# yaml-language-server: $schema=schema.json\nmodel: {lrsa: {top_k: 16}}\n```\n"
    for part, title in PARTS.items():
        path = catalogue.DATA if part == "data" else str(catalogue.part_of(part))
        prefix = "data.init_args" if part == "data" else part
        yield f"## {title}: `{prefix}`\n"
        given = catalogue.value_at(defaults, prefix)
        yield from _listed(catalogue.keys(path), f"{prefix}.", given if isinstance(given, Mapping) else {})
    yield "## The defaults of every command\n"
    yield "The file `cli.yaml`, which is read before any other:\n"
    yield f"```yaml\n{shipped('cli.yaml').read_text(encoding='utf-8').rstrip()}\n```\n"


def _classes() -> Iterator[str]:
    slots = {kind: slot for slot, kind in catalogue.SLOTS.items()}
    yield "# Classes\n"
    yield (
        "To choose a class, give its name. To set its arguments, give `class_path` and `init_args`. "
        "[A class of your own](../extending.md) is chosen in the same way.\n"
    )
    for kind, title in KINDS.items():
        yield f"## {title}\n"
        yield f"Setting: `{slots[kind]}`.\n"
        for path in catalogue.named(kind).values():
            yield from _class(path, f"`{path}`")
    assert set(KINDS) == {*plugins.KINDS, "callbacks"}
    yield "## Gates, schedules, strategies and the logger\n"
    for setting, paths in catalogue.OTHERS.items():
        for path in paths:
            yield from _class(path, f"`{path}`, for `{setting}`")


def _class(path: str, where: str) -> Iterator[str]:
    found = source_text.find(path)
    yield f"### {path.rpartition('.')[2]}\n"
    yield f"{where}\n"
    yield f"{_plain(found.about if found else '')}\n"
    yield from _listed(catalogue.keys(path), "", {})


def _configs() -> Iterator[str]:
    yield "# Shipped YAML\n"
    yield "`--config configs/…` finds these files from any folder. Combine several; later ones override earlier ones.\n"
    root, folder = shipped("configs/model/tiny.yaml").parents[1], ""
    for path in sorted(root.rglob("*.yaml")):
        name = path.relative_to(root).as_posix()
        if name.partition("/")[0] != folder:
            folder = name.partition("/")[0]
            yield f"\n## {folder}\n\n| file | what it sets |\n|---|---|"
        yield f"| [{name}](../../configs/{name}) | {catalogue.about(path).replace('|', '/')} |"
    yield ""


def _listed(settings: Mapping[str, Setting], prefix: str, given: Mapping[str, object]) -> Iterable[str]:
    """A line for each setting: its type, default, and what it does."""
    for name, setting in settings.items():
        value = given.get(name)
        plain = isinstance(value, int | float | str) and "$" not in str(value)
        default = str(value) if plain else None if setting.default is None else _in_yaml(setting.default)
        kind = " ".join(re.sub(r"\bNone\b", "null", setting.kind).split())
        facts = [f"`{kind}`"] if kind else []
        facts += ["required" if default is None else f"default `{' '.join(default.split())}`"]
        yield f"- **`{prefix}{name}`** ({', '.join(facts)}): {' '.join(_plain(setting.about).split())}"
    yield ""


def _in_yaml(written: str) -> str:
    """A default of the code as YAML writes it."""
    plain = {"None": "null", "True": "true", "False": "false"}.get(written, written)
    return plain.strip("'\"") or "''"


def _plain(text: str) -> str:
    """Docstrings with Markdown in the place of Sphinx's marks."""
    text = re.sub(r":\w+:`~?(?:[\w.]+\.)?(\w+)`", r"`\1`", text).replace("``", "`")
    return re.sub(r"(?<!\n)\n(?!\n)", " ", text)
