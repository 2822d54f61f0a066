"""Sealed folders: any change is noticed, and what is built appears whole or not at all."""

import os
import stat

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lrsa_lit import verified


def fill(folder):
    (folder / "deep").mkdir()
    (folder / "deep/weights.bin").write_bytes(bytes(range(200)))
    (folder / "config.json").write_text("{}")


@pytest.fixture
def folder(tmp_path):
    verified.build(tmp_path / "models/one", fill)
    return tmp_path / "models/one"


def test_what_was_built_is_whole_and_alone(folder):
    assert verified.damage(folder) is None
    assert [path.name for path in folder.parent.iterdir()] == ["one"]


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_the_umask_decides_who_may_read(tmp_path, umask):
    before = os.umask(umask)
    try:
        verified.build(tmp_path / "one", fill)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "one").stat().st_mode) == 0o777 & ~umask
    assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "one").rglob("*") if path.is_file()} == {
        0o666 & ~umask
    }


@given(bit=st.integers(0, 8 * (200 + 2) - 1))
def test_each_flipped_bit_is_damage(tmp_path_factory, bit):
    folder = tmp_path_factory.mktemp("flipped")
    fill(folder)
    verified.seal(folder)
    name, place = ("deep/weights.bin", bit // 8) if bit < 8 * 200 else ("config.json", bit // 8 - 200)
    content = bytearray((folder / name).read_bytes())
    content[place] ^= 1 << bit % 8
    (folder / name).write_bytes(content)
    assert name in verified.damage(folder)


def test_a_change_after_the_first_look_is_noticed(folder):
    assert verified.damage(folder) is None
    (folder / "config.json").write_text("[]")
    assert "config.json" in verified.damage(folder)


def test_contents_are_read_once(folder, monkeypatch):
    assert verified.damage(folder) is None
    monkeypatch.setattr(verified, "sha256_of", lambda path: pytest.fail("read again"))
    assert verified.damage(folder) is None


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda folder: (folder / "config.json").unlink(), "config.json is missing"),
        (lambda folder: (folder / "more").touch(), "more does not belong there"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json has 1 bytes instead of 2"),
        (lambda folder: (folder / verified.SEAL).unlink(), "seal.json is missing"),
        (lambda folder: (folder / verified.SEAL).write_text('{"files": [1]}'), "seal.json cannot be read"),
        (lambda folder: (folder / verified.SEAL).write_bytes(b"\xff"), "seal.json cannot be read"),
    ],
)
def test_damage_is_named(folder, change, said):
    change(folder)
    assert said in verified.damage(folder)


@pytest.mark.parametrize("name", [".DS_Store", "deep/.nfs0000012"])
def test_files_of_the_system_are_no_damage(folder, name):
    (folder / name).touch()
    assert verified.damage(folder) is None


def test_a_hidden_file_of_the_seal_is_checked(tmp_path):
    (tmp_path / ".metadata").write_bytes(b"a")
    verified.seal(tmp_path)
    (tmp_path / ".metadata").unlink()
    assert verified.damage(tmp_path) == ".metadata is missing"


def test_a_damaged_folder_is_replaced_and_a_good_one_is_not(folder):
    def other(folder):
        (folder / "other").touch()

    verified.build(folder, other)
    assert (folder / "config.json").exists()
    (folder / "config.json").write_text("[]")
    verified.build(folder, other)
    assert sorted(path.name for path in folder.iterdir()) == ["other", verified.SEAL]
    assert [path.name for path in folder.parent.iterdir()] == ["one"]


def test_a_failure_leaves_what_was_there(folder):
    def full(folder):
        (folder / "half").touch()
        raise OSError(28, "No space left on device")

    (folder / "config.json").write_text("[]")
    with pytest.raises(OSError, match="No space left"):
        verified.build(folder, full)
    assert (folder / "config.json").read_text() == "[]"
    assert [path.name for path in folder.parent.iterdir()] == ["one"]
