"""Selection records as files."""

import json
import stat
import subprocess
import sys

import numpy as np
import pytest
from helpers import refused

from lrsa_lit.analysis.record import SCHEMA, SelectionRecord
from lrsa_lit.attention import LRSAConfig

RULE = LRSAConfig(sink_size=2, lag_size=8, top_k=3, dense_layers=(1,))


@pytest.mark.parametrize("lengths", [(70, 40), (12,), (300, 5)])
def test_what_is_loaded_is_what_was_saved(drawn, tmp_path, lengths):
    record = drawn(lengths, rule=RULE, step=7)
    record.save(tmp_path / "deep/r.npz")
    loaded = SelectionRecord.load(tmp_path / "deep/r.npz")
    assert (loaded.rule, loaded.model, loaded.digest, loaded.step) == (record.rule, "tiny", record.digest, 7)
    assert LRSAConfig.from_dict(loaded.rule) == RULE
    assert loaded.texts == record.texts
    assert loaded.layers == [0, 2]
    for ours, theirs in zip(record.samples, loaded.samples, strict=True):
        assert (ours.id, ours.gold_spans, ours.answer_spans) == (theirs.id, theirs.gold_spans, theirs.answer_spans)
        for name in ("token_ids", "positions", "scores"):
            mine, read = getattr(ours, name), getattr(theirs, name)
            np.testing.assert_allclose(mine, read, rtol=1e-3 if name == "scores" else 0)
            assert mine.dtype == read.dtype


def test_file_holds_small_integers_and_no_mask(drawn, tmp_path):
    drawn((200, 300)).save(tmp_path / "r.npz")
    with np.load(tmp_path / "r.npz") as file:
        assert file["tokens0"].dtype == np.uint8
        assert file["places1"].dtype == np.uint8
        assert file["places1"].shape == (3, 2, 36, 3)
        assert file["scores1"].dtype == np.float16


def test_scores_beyond_half_precision_stay_as_they_are(drawn, tmp_path):
    record = drawn((70,))
    record.samples[0].scores[0, :] = 1e5
    record.save(tmp_path / "r.npz")
    loaded = SelectionRecord.load(tmp_path / "r.npz")
    np.testing.assert_array_equal(loaded.samples[0].scores, record.samples[0].scores)


def test_a_file_with_whole_positions_and_full_scores_is_read(drawn, tmp_path):
    record = drawn((70, 40))
    record.save(tmp_path / "r.npz")
    with np.load(tmp_path / "r.npz") as file:
        arrays = {name: values for name, values in file.items() if not name.startswith("places")}
    for index, sample in enumerate(record.samples):
        arrays |= {f"positions{index}": sample.positions.astype(np.uint8), f"scores{index}": sample.scores}
    np.savez(tmp_path / "old.npz", **arrays)
    for sample, read in zip(record.samples, SelectionRecord.load(tmp_path / "old.npz").samples, strict=True):
        np.testing.assert_array_equal(sample.positions, read.positions)
        np.testing.assert_array_equal(sample.scores, read.scores)


def test_file_is_whole_or_absent(drawn, tmp_path, monkeypatch):
    path = tmp_path / "r.npz"
    drawn().save(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    before = path.read_bytes()

    def full_disk(file, **arrays):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("numpy.savez_compressed", full_disk)
    with pytest.raises(OSError, match="No space"):
        drawn(seed=1).save(path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["r.npz"]


def test_reading_needs_no_torch(drawn, tmp_path):
    drawn().save(tmp_path / "r.npz")
    script = (
        "import sys; from pathlib import Path; from lrsa_lit.analysis import metrics, plots, record, runs;"
        f"r = record.SelectionRecord.load(Path({str(tmp_path / 'r.npz')!r}));"
        "print(metrics.survival(r, 'gold').tokens, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["38", "False"]


def test_bad_files_are_told_in_one_line(drawn, tmp_path):
    path = tmp_path / "r.npz"
    drawn().save(path)
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], whole[:-30], b"", b"PK\x03\x04nothing", b"no archive at all"):
        path.write_bytes(content)
        with refused(str(path), reason="truncated"):
            SelectionRecord.load(path)
    np.savez(path, something=np.zeros(3))
    with refused(str(path), reason="not a selection record"):
        SelectionRecord.load(path)
    with refused(str(tmp_path / "none.npz")):
        SelectionRecord.load(tmp_path / "none.npz")


def test_another_version(drawn, tmp_path):
    path = tmp_path / "r.npz"
    drawn().save(path)
    with np.load(path) as file:
        arrays = dict(file)
    header = json.dumps(json.loads(arrays["header"].tobytes()) | {"schema": SCHEMA + 1})
    np.savez(path, **arrays | {"header": np.frombuffer(header.encode(), dtype=np.uint8)})
    with refused(str(path), reason=f"version {SCHEMA + 1}"):
        SelectionRecord.load(path)
