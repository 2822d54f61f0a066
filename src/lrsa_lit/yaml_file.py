"""Read YAML from users: errors are reported in one line, and nothing is dropped silently."""

from __future__ import annotations

import copy
import functools
import re
from pathlib import Path
from typing import Any

import yaml

from lrsa_lit.errors import UserError, message_of

# Libyaml is ten times as fast, where PyYAML is built with it.
_PLAIN = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_MERGE = "tag:yaml.org,2002:merge"
_NO_NAMES = {"tag:yaml.org,2002:bool": "true or false", "tag:yaml.org,2002:null": "nothing"}
_MOST_BYTES = 1 << 22
_MOST_VALUES = 100_000


class _Refused(yaml.MarkedYAMLError):
    """YAML that other parsers accept or hang on: values that are too large or endless, and keys that are not names."""


class _Loader(yaml.SafeLoader):
    """Refuses a key that occurs twice in a mapping; YAML's own loader would silently keep the last one.

    Reads 2e-4 as a number, as the command line does; in YAML 1.1 it is a string, because it has no dot.
    """

    def get_single_node(self) -> yaml.Node | None:
        node: yaml.Node | None = super().get_single_node()
        if node is not None:
            _count(node, {})
        return node

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if key.tag in _NO_NAMES:
                problem = f"the key {key.value!r} is read as {_NO_NAMES[key.tag]}; write it in quotes"
                raise _Refused(problem=problem, problem_mark=key.start_mark)
            name = key.tag, str(key.value)
            if name in seen and key.tag != _MERGE:
                raise yaml.MarkedYAMLError(problem=f"the key {key.value!r} occurs twice", problem_mark=key.start_mark)
            seen.add(name)
        return node


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def _count(node: yaml.Node, counts: dict[yaml.Node, int]) -> int:
    """The number of values in a node with expanded aliases; _Refused if there are too many or infinitely many."""
    if counts.get(node):
        return counts[node]
    if node in counts:
        raise _Refused(problem="a value contains itself", problem_mark=node.start_mark)
    counts[node] = 0
    parts = node.value if isinstance(node, yaml.CollectionNode) else []
    if isinstance(node, yaml.MappingNode):
        parts = [part for pair in parts for part in pair]
    total = 1 + sum(_count(part, counts) for part in parts)
    if total > _MOST_VALUES:
        problem = f"it contains more than {_MOST_VALUES} values, counting repeated ones"
        raise _Refused(problem=problem, problem_mark=node.start_mark)
    counts[node] = total
    return total


@functools.lru_cache(maxsize=32)
def _loaded(text: str) -> Any:
    """The content of YAML text, not to be changed; a command reads each of its config files several times."""
    return yaml.load(text, _Loader)


def dumped_settings(text: str) -> dict[str, Any]:
    """The mapping in YAML text that a library has written, which needs no checks."""
    content: dict[str, Any] = yaml.load(text, _PLAIN)
    return content


def read_settings(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file, which must be UTF-8.

    Raises:
        UserError: it cannot be read, is not YAML or not a mapping, has a key twice, contains itself, or is too large.
    """
    try:
        _check_size(path)
        content = copy.deepcopy(_loaded(path.read_text(encoding="utf-8")))
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"{path}{line}", reason=str(error.problem)) from None
    except UserError:
        raise
    except RecursionError:
        raise UserError(str(path), reason="it is nested too deeply") from None
    except (yaml.YAMLError, OSError, ValueError) as error:
        # ValueError: text that is not UTF-8, an invalid date, or an integer of thousands of digits.
        raise UserError(str(path), reason=f"it cannot be read as YAML ({message_of(error)})") from None
    if not isinstance(content, dict):
        found = "nothing" if content is None else f"a {type(content).__name__}"
        raise UserError(str(path), reason=f"it holds {found}", allowed="a mapping of settings")
    return content


def check_bounds(key: str, text: str | Path) -> None:
    """Check that YAML text or a YAML file is finite, before a library reads it, which reports other errors.

    Raises:
        UserError: the value of ``key`` contains itself, is nested too deeply, or is too large.
    """
    try:
        if isinstance(text, Path):
            _check_size(text)
            text = text.read_text(encoding="utf-8")
        _loaded(text)
    except _Refused as error:
        raise UserError(key, reason=str(error.problem)) from None
    except RecursionError:
        raise UserError(key, reason="it is nested too deeply") from None
    except UserError as error:
        raise UserError(key, reason=str(error)) from None
    except (yaml.YAMLError, OSError, ValueError):
        return


def _check_size(path: Path) -> None:
    if (size := path.stat().st_size) > _MOST_BYTES:
        raise UserError(str(path), reason=f"it has {size} bytes; settings may have at most {_MOST_BYTES}")
