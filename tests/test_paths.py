"""Files of packages, of the project and of the user."""

import hashlib
from pathlib import Path

import pytest
from helpers import refused

from lrsa_lit.io import sha256_of
from lrsa_lit.paths import cache_dir, check_writable, resolve, shipped, short_name


def test_file_inside_a_package():
    path = resolve("package://pytest/pytest/py.typed")
    assert path.name == "py.typed"


def test_package_without_that_file():
    with refused("source", "package://pytest/nowhere.bin"):
        resolve("package://pytest/nowhere.bin")


def test_digest_is_checked(tmp_path):
    file = tmp_path / "x"
    file.write_bytes(b"abc")
    good = hashlib.sha256(b"abc").hexdigest()
    assert sha256_of(file) == good
    assert resolve(str(file), good) == file
    with refused("source", str(file), reason="expected 00"):
        resolve(str(file), "00")


def test_own_file_before_a_shipped_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert resolve("data/sample.jsonl") == shipped("data/sample.jsonl")
    (tmp_path / "data").mkdir()
    (tmp_path / "data/sample.jsonl").write_text("mine")
    assert resolve("data/sample.jsonl").read_text() == "mine"


def test_a_shipped_config_has_a_short_name_unless_a_file_here_has_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = "configs/debug/tiny.yaml"
    path = str(shipped(name))
    assert [short_name(text) for text in (path, f"{path}.old", "a.yaml")] == [name, f"{name}.old", "a.yaml"]
    assert short_name(str(shipped("data/sample.jsonl"))) == str(shipped("data/sample.jsonl"))
    (tmp_path / "configs/debug").mkdir(parents=True)
    (tmp_path / name).write_text("mine")
    assert short_name(path) == path


def test_cache_dir_follows_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("LRSA_CACHE_DIR", str(tmp_path))
    assert cache_dir("a", "b") == tmp_path / "a" / "b"


@pytest.mark.parametrize(
    "source",
    [
        *("package://", "package://pytest", "package://pytest/", "package:///etc/passwd", "package://../x/y"),
        *("package://pytest/../x", "package://pytest/./py.typed", "package://pytest/a\0b", "package://\0/x"),
        *("package://a b/c", "a\0b", "x" * 5000, "/" + "y" * 300, "~nobody-of-that-name/x", ".", "/dev/zero", "a\nb"),
    ],
)
def test_what_is_no_path_is_one_line(source):
    with refused("train"):
        resolve(source, key="train")


@pytest.mark.parametrize(("folder", "why"), [("file", "Not a directory"), ("file/in", "Not a directory"),
                                             ("/proc/in", "No such file"), ("gone/in", "No such file")])  # fmt: skip
def test_a_folder_is_tried_without_a_trace(folder, why, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    (tmp_path / "gone").symlink_to("nowhere")
    (tmp_path / "there").mkdir()
    for name in ("there", "there/deep/er", "new"):
        check_writable("to", name, Path(name))
    with refused("to", folder, reason=f"cannot be written ({why}"):
        check_writable("to", folder, Path(folder))
    assert {path.name for path in tmp_path.rglob("*")} == {"file", "gone", "there"}
