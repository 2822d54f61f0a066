"""Files are there as a whole or not at all, and what is wrong with one is noticed."""

import errno
import os
import signal
import stat

import pytest
import torch
from helpers import refused

from lrsa_lit.checkpoints import AtomicCheckpointIO
from lrsa_lit.checkpoints.checkpoint_io import CheckpointNotSaved, claim, newest_first, release, tidy
from lrsa_lit.io import PARTIAL, partial_folder, write_atomically
from lrsa_lit.models.checkpoint_file import damage


class Full:
    """A disk that is full after some bytes."""

    def __init__(self, file, left):
        self.file, self.left = file, left

    def write(self, data):
        if len(data) > self.left:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.left -= len(data)
        return self.file.write(data)

    def flush(self):
        self.file.flush()


@pytest.fixture
def checkpoint():
    return {"weights": torch.arange(50_000.0), "step": 3}


@pytest.fixture
def saved(tmp_path, checkpoint):
    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint(checkpoint, path)
    return path


def test_saves_and_loads(saved, checkpoint):
    loaded = AtomicCheckpointIO().load_checkpoint(saved)
    assert torch.equal(loaded["weights"], checkpoint["weights"])
    assert damage(saved) is None
    assert [path.name for path in saved.parent.iterdir()] == ["last.ckpt"]


def test_permissions_are_those_of_any_file(saved, tmp_path):
    (tmp_path / "other").touch()
    assert stat.S_IMODE(saved.stat().st_mode) == stat.S_IMODE((tmp_path / "other").stat().st_mode)


@pytest.mark.parametrize("left", [0, 1_000, 100_000])
def test_full_disk_leaves_the_previous_checkpoint(saved, checkpoint, monkeypatch, left):
    before, save = saved.read_bytes(), torch.save
    monkeypatch.setattr(torch, "save", lambda value, file: save(value, Full(file, left)))
    with pytest.raises(CheckpointNotSaved, match=r"last\.ckpt: not saved \(No space left on device\)"):
        AtomicCheckpointIO().save_checkpoint({**checkpoint, "step": 4}, saved)
    assert saved.read_bytes() == before
    assert [path.name for path in saved.parent.iterdir()] == ["last.ckpt"]


def test_other_errors_are_not_taken_for_the_disk(saved, monkeypatch):
    monkeypatch.setattr(torch, "save", lambda value, file: exec("raise RuntimeError('a bug')"))
    with pytest.raises(RuntimeError, match="a bug"):
        AtomicCheckpointIO().save_checkpoint({}, saved)


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "owned"),)

    torch.save({"state_dict": Evil()}, tmp_path / "evil.ckpt")
    with pytest.raises(Exception, match=r"[Ww]eights.only"):
        AtomicCheckpointIO().load_checkpoint(tmp_path / "evil.ckpt")
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("kept", [0, 1, 1_000, -1])
def test_truncation_is_damage(saved, kept):
    content = saved.read_bytes()
    saved.write_bytes(content[:kept])
    assert damage(saved)


def test_a_changed_bit_is_damage(saved):
    content = bytearray(saved.read_bytes())
    content[len(content) // 2] ^= 1
    saved.write_bytes(content)
    assert "CRC" in damage(saved)


def begin_another(folder):
    with partial_folder(folder / "other"):
        pass


@pytest.mark.parametrize("clean", [tidy, begin_another])
def test_what_a_dead_process_left_is_removed_and_what_a_living_one_writes_is_not(tmp_path, clean):
    """It has begun a folder and a file, and is killed while it writes."""
    told, tell = os.pipe()

    def die(file):
        file.write(b"half")
        file.flush()
        os.write(tell, b"!")
        signal.pause()

    if not (child := os.fork()):
        with partial_folder(tmp_path / "one"):
            write_atomically(tmp_path / "last.ckpt", die)
        os._exit(0)
    os.read(told, 1)
    begun = set(tmp_path.iterdir())
    assert len(begun) == 2
    (tmp_path / f".mine{PARTIAL}").mkdir()

    clean(tmp_path)
    assert begun < set(tmp_path.iterdir())
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    clean(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [f".mine{PARTIAL}"]


def test_one_process_at_a_time_writes_a_run_s_checkpoints(tmp_path, claiming):
    with claiming(tmp_path / "run" / "checkpoints"):
        assert not claim(tmp_path / "run" / "checkpoints")
        assert claim(tmp_path / "other" / "checkpoints")
    assert claim(tmp_path / "run" / "checkpoints")
    assert claim(tmp_path / "run" / "checkpoints")
    release(tmp_path / "run" / "checkpoints")
    with claiming(tmp_path / "run" / "checkpoints"):
        assert not claim(tmp_path / "run" / "checkpoints")


def test_a_folder_without_its_last_part_is_damaged(tmp_path):
    for name in (".metadata", "__0_0.distcp"):
        (tmp_path / name).touch()
    assert "meta.pt" in damage(tmp_path)
    torch.save({}, tmp_path / "meta.pt")
    assert damage(tmp_path) is None


def test_a_replacement_cut_short_is_taken_back(tmp_path):
    (tmp_path / ".last.ckpt.old").mkdir()
    (tmp_path / ".last.ckpt.old" / "content").touch()
    tidy(tmp_path)
    assert (tmp_path / "last.ckpt" / "content").exists()


def test_a_folder_needs_another_strategy(tmp_path):
    with refused("ckpt_path", str(tmp_path)):
        AtomicCheckpointIO().load_checkpoint(tmp_path)


def test_newest_first(tmp_path):
    for time, name in enumerate(["b.ckpt", "c.ckpt", "a.ckpt"]):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (time, time))
    (tmp_path / ".last.ckpt.1.partial").touch()
    (tmp_path / "loop.ckpt").symlink_to("loop.ckpt")
    (tmp_path / "nowhere.ckpt").symlink_to("x")
    assert [path.name for path in newest_first(tmp_path)] == ["a.ckpt", "c.ckpt", "b.ckpt"]
