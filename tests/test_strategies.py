"""Checkpoints of the sharded strategy, written by one process."""

import pytest
import torch
from torch.distributed.checkpoint.filesystem import FileSystemWriter

from lrsa_lit.models.checkpoint_file import Unreadable, holds_shards, read
from lrsa_lit.models.shards import empty_weights, read_weights
from lrsa_lit.strategies import FullySharded

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def checkpoint(value):
    return {"state_dict": {"a.b": torch.full((3, 2), value)}, "optimizer_states": [], "global_step": 7}


def save(value, path):
    FullySharded().save_checkpoint(checkpoint(value), path)


@pytest.mark.parametrize("before", ["nothing", "folder", "file"])
def test_a_checkpoint_takes_the_place_of_what_was_there(before, tmp_path):
    path = tmp_path / "deep" / "last.ckpt"
    if before == "folder":
        save(1.0, path)
        (path / "stale.distcp").touch()
    elif before == "file":
        path.parent.mkdir()
        path.touch()
    save(2.0, path)
    assert holds_shards(path)
    assert read(path) == {"global_step": 7}
    assert {name: weight.shape for name, weight in empty_weights(path).items()} == {"a.b": (3, 2)}
    assert torch.equal(read_weights(path)["a.b"], torch.full((3, 2), 2.0))
    assert not (path / "stale.distcp").exists()
    assert [found.name for found in path.parent.iterdir()] == ["last.ckpt"]


def test_a_full_disk_leaves_the_checkpoint_that_was_there(tmp_path, monkeypatch):
    path = tmp_path / "last.ckpt"
    save(1.0, path)

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(FileSystemWriter, "write_data", full)
    with pytest.raises(OSError, match=r"last\.ckpt cannot be written .*No space left on device"):
        save(2.0, path)
    assert torch.equal(read_weights(path)["a.b"], torch.full((3, 2), 1.0))
    assert [found.name for found in tmp_path.iterdir()] == ["last.ckpt"]


@pytest.mark.parametrize("missing", [".metadata", "meta.pt", "__0_0.distcp"])
def test_a_truncated_checkpoint_is_told_from_a_whole_one(missing, tmp_path):
    path = tmp_path / "last.ckpt"
    save(1.0, path)
    (path / missing).unlink()
    if missing.endswith("distcp"):
        with pytest.raises(Unreadable, match="distcp"):
            read_weights(path)
    else:
        assert not holds_shards(path)
