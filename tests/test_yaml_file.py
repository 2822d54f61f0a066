"""A YAML file is a mapping of settings of a sane size, or refused with its name in one line."""

import pytest
from helpers import one_line

from lrsa_lit.errors import UserError
from lrsa_lit.yaml_file import read_settings

LAUGHS = "a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)
REFUSED = {
    "a list that contains itself": ("a: &a [*a]", "line 1: a value contains itself"),
    "a mapping that contains itself": ("model: &m\n  evaluate: {x: *m}", "contains itself"),
    "aliases of aliases": (LAUGHS, "more than 100000 values"),
    "mappings within mappings": ("a: " + "{a: " * 5000 + "1" + "}" * 5000, "nested too deeply"),
    "lists within lists": ("a: " + "[" * 20000 + "]" * 20000, "nested too deeply"),
    "an integer of 5,000 digits": ("a: " + "9" * 5000, "cannot be read as YAML"),
    "no such date": ("a: 2020-13-45", "cannot be read as YAML"),
    "a NUL": ("a: \0", "cannot be read as YAML"),
    "a tag of Python": ("a: !!python/object/apply:os.getcwd []", "line 1"),
    "another tag": ("a: !mine x", "line 1"),
    "two documents": ("a: 1\n---\nb: 2", "line 2"),
    "a key that is a list": ("? [a]\n: 2", "line 1"),
    "an alias of nothing": ("a: *b", "line 1"),
    "other text": (b"a: \xe9", "cannot be read as YAML"),
    "too many bytes": ("a: 1 #" + "x" * (1 << 22), "bytes"),
}


@pytest.mark.parametrize(("content", "told"), REFUSED.values(), ids=REFUSED)
def test_what_is_no_settings_is_refused(tmp_path, content, told):
    path = tmp_path / "x.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as caught:
        read_settings(path)
    line = one_line(caught.value)
    assert line.startswith(str(path))
    assert told in line


def test_aliases_are_settings(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text("base: &b {x: 1, y: [1, 2]}\nother: {<<: *b, z: *b}")
    assert read_settings(path)["other"] == {"x": 1, "y": [1, 2], "z": {"x": 1, "y": [1, 2]}}
