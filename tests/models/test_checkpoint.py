"""Checkpoints are data: what is damaged, made up or hostile is refused in one line, and no code in it runs."""

import io
import json
import os
import pickle
import struct
import zipfile

import pytest
import torch
from helpers import one_line, refused
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed import checkpoint as distributed
from torch.distributed.checkpoint.filesystem import FileSystemWriter

from lrsa_lit import verified
from lrsa_lit.attention import LRSAConfig
from lrsa_lit.errors import UserError
from lrsa_lit.models import Backbone, LoRA
from lrsa_lit.models.checkpoint import describe, load_trained
from lrsa_lit.models.checkpoint_file import INDEX, META, Unreadable, read
from lrsa_lit.models.shards import load_into
from lrsa_lit.models.tiny import tiny_model, tiny_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
RULE = LRSAConfig(sink_size=2, lag_size=8, top_k=3).to_dict()


class Evil:
    """Makes a folder when it is unpickled."""

    def __init__(self, mark):
        self.mark = str(mark)

    def __reduce__(self):
        return os.mkdir, (self.mark,)


def content(backbone=None):
    """What a fit writes."""
    backbone = backbone or Backbone("tiny", lora=LoRA(rank=1, target_modules=["q_proj"]))
    named = dict(backbone.build().named_parameters())
    weights = {f"model.{name}": weight.detach() for name, weight in named.items() if weight.requires_grad}
    checkpoint = {"state_dict": weights, "pytorch-lightning_version": "2.6.6", "global_step": 3}
    describe(checkpoint, backbone, dict(RULE))
    return checkpoint


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("file") / "last.ckpt"
    torch.save(content(), path)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("shards") / "last.ckpt"
    rest = content()
    distributed.save({"state_dict": rest.pop("state_dict")}, storage_writer=FileSystemWriter(path))
    torch.save(rest, path / META)
    verified.seal(path)
    return path


def same(found, expected):
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_a_flipped_bit_of_a_file_is_refused_or_changes_nothing(file, tmp_path_factory, place, bit):
    flipped = bytearray(file.read_bytes())
    flipped[int(place * len(flipped))] ^= 1 << bit
    path = tmp_path_factory.mktemp("flipped") / "flipped.ckpt"
    path.write_bytes(flipped)
    try:
        found = load_trained(path)
    except UserError as error:
        one_line(error)
    else:
        assert same(found.weights, load_trained(file).weights)
        assert found.rule == RULE


@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
@pytest.mark.parametrize("name", [INDEX, META, "__0_0.distcp"])
def test_a_flipped_bit_of_a_folder_is_refused(folder, tmp_path_factory, name, place, bit):
    path = tmp_path_factory.mktemp("flipped") / "flipped.ckpt"
    path.mkdir()
    for part in folder.iterdir():
        if part.name != name:
            os.link(part, path / part.name)
    flipped = bytearray((folder / name).read_bytes())
    flipped[int(place * len(flipped))] ^= 1 << bit
    (path / name).write_bytes(flipped)
    with refused("model", reason="damaged"):
        load_trained(path)


def test_a_folder_without_digests_is_read_and_the_log_says_so(folder, tmp_path, caplog):
    for part in folder.iterdir():
        if part.name != verified.SEAL:
            os.link(part, tmp_path / part.name)
    assert same(load_trained(tmp_path).weights, load_trained(folder).weights)
    assert "cannot be checked" in caplog.text


def test_code_in_the_index_does_not_run(folder, tmp_path):
    torch.save(content(), tmp_path / META)
    (tmp_path / INDEX).write_bytes(pickle.dumps(Evil(tmp_path / "owned")))
    with refused("model", reason="damaged"):
        load_trained(tmp_path)
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("outside", ["/dev/zero", "../x", "", ".", ".."])
def test_an_index_names_files_of_its_folder_alone(folder, tmp_path, outside):
    index = pickle.loads((folder / INDEX).read_bytes())
    for info in index.storage_data.values():
        info.relative_path = outside
    torch.save(torch.load(folder / META, weights_only=True), tmp_path / META)
    (tmp_path / INDEX).write_bytes(pickle.dumps(index))
    with refused("model", tmp_path, reason="not in the folder"):
        load_trained(tmp_path)


def test_code_among_the_shards_does_not_run(tmp_path):
    """Torch unpickles what is no tensor, such as the numbers of an optimizer."""
    number = {"lr": Evil(tmp_path / "owned")}
    distributed.save(number, storage_writer=FileSystemWriter(tmp_path / "shards"))
    with pytest.raises(Unreadable):
        load_into({"lr": 0.1}, tmp_path / "shards", no_dist=True)
    assert not (tmp_path / "owned").exists()


def test_numbers_among_the_shards_are_read(tmp_path):
    held = {"a": {"betas": (0.9, 0.99), "step": torch.tensor(3.0), "names": ["x"], "none": None}}
    distributed.save(held, storage_writer=FileSystemWriter(tmp_path / "shards"))
    found = {"a": {"betas": (0.0, 0.0), "step": torch.tensor(0.0), "names": ["y"], "none": 1}}
    load_into(found, tmp_path / "shards", no_dist=True)
    assert found == held


WRONG = [None, 0, "text", [], {}, {"a": 1}, [[]], True, torch.zeros(2)]
PLACES = [("lrsa_lit",), ("lrsa_lit", "backbone"), ("lrsa_lit", "rule"), ("state_dict",), ("lrsa_lit", "rule", "top_k")]
PLACES += [("lrsa_lit", "backbone", name) for name in ("source", "sha256", "dtype", "lora", "quantization", "more")]
PLACES += [("lrsa_lit", "backbone", "lora", name) for name in ("rank", "dropout", "target_modules", "more")]


@pytest.mark.parametrize("place", PLACES, ids=".".join)
def test_what_a_fit_does_not_write_is_refused_in_one_line(tmp_path, place):
    for number, wrong in enumerate([KeyError, *WRONG]):
        made = content()
        *above, last = place
        holder = made
        for name in above:
            holder = holder[name]
        holder.pop(last, None) if wrong is KeyError else holder.update({last: wrong})
        path = tmp_path / f"{number}.ckpt"
        torch.save(made, path)
        try:
            load_trained(path).build()
        except UserError as error:
            one_line(error)


@pytest.mark.parametrize("change", ["missing", "more", "shape"])
def test_weights_that_do_not_fit_are_refused(tmp_path, change):
    for backbone in (Backbone("tiny"), Backbone("tiny", lora=LoRA(rank=1))):
        made = content(backbone)
        weights = made["state_dict"]
        name = min(weights)
        if change == "missing":
            del weights[name]
        elif change == "more":
            weights["model.more"] = torch.zeros(2)
        else:
            weights[name] = torch.zeros(3, 3, 3)
        torch.save(made, tmp_path / "x.ckpt")
        with refused("model", reason="1 of the trained weights"):
            load_trained(tmp_path / "x.ckpt").build()


@pytest.mark.parametrize("name", ["/dev/zero", "a\0b", "x" * 5000, "fifo", "nowhere"])
def test_what_is_no_file_is_not_read(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("fifo")
    with refused("model"):
        load_trained(type(tmp_path)(name))


def test_what_is_compressed_is_not_unpacked(tmp_path):
    """A file of a few kilobytes may unpack to any size."""
    with zipfile.ZipFile(tmp_path / "bomb.ckpt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(10_000_000))
    with pytest.raises(Unreadable, match="compressed"):
        read(tmp_path / "bomb.ckpt")


@pytest.mark.parametrize("written", [pickle.dumps([1]), b"", b"\x80\x02}q\x00(", struct.pack("<3d", 1, 2, 3)])
def test_a_pickle_of_something_else(tmp_path, written):
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        for name, data in {"data.pkl": written, "byteorder": b"little", "version": b"3\n"}.items():
            archive.writestr(f"archive/{name}", data)
    (tmp_path / "x.ckpt").write_bytes(made.getvalue())
    with pytest.raises(Unreadable):
        read(tmp_path / "x.ckpt")


def test_a_checkpoint_does_not_decide_whose_code_runs(tmp_path):
    base = tmp_path / "base"
    tiny_model().save_pretrained(base), tiny_tokenizer().save_pretrained(base)
    config = json.loads((base / "config.json").read_text())
    config |= {"model_type": "evil", "auto_map": {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}}
    (base / "config.json").write_text(json.dumps(config))
    (base / "code.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'owned')!r})\n")
    made = content()
    assert "trust_remote_code" not in made["lrsa_lit"]["backbone"]
    made["lrsa_lit"]["backbone"] |= {"source": str(base), "trust_remote_code": True}
    torch.save(made, tmp_path / "x.ckpt")
    with refused("trust_remote_code"):
        load_trained(tmp_path / "x.ckpt").build()
    assert not (tmp_path / "owned").exists()
    assert load_trained(tmp_path / "x.ckpt", trust_remote_code=True).backbone.trust_remote_code
