"""The operator's README: its code runs and its pictures are true."""

import re
from pathlib import Path

import pytest
import torch
from visible import visible_keys

from lrsa_lit.ops import sparse_attention
from lrsa_lit.ops.sparse_attention import Rule
from lrsa_lit.ops.sparse_attention.geometry import attended_pairs, compressed_at, raw_start

TEXT = (Path(sparse_attention.__file__).parent / "README.md").read_text(encoding="utf-8")


def test_the_code_runs_from_top_to_bottom():
    names: dict = {}
    blocks = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        exec(compile(block, "README.md", "exec", dont_inherit=True), names)
    assert names["output"].shape == names["packed"].shape == (1, 8, 1000, 64)
    assert names["same"].equal(names["output"])
    again = names["sparse_attention"](names["query"], names["key"], names["value"], names["rule"])
    assert not torch.allclose(again, names["output"]), "the second rule has another compressor"


def test_the_picture_of_visibility_is_true():
    config = Rule(2, 4, 2)
    torch.manual_seed(0)
    key, value = torch.randn(1, 1, 23, 8), torch.randn(1, 1, 23, 8)
    mask = visible_keys(key, value, config)[0, 0]
    rows = re.findall(r"^ *(\d+) +(\d+) +([srk.]+)$", TEXT, re.MULTILINE)
    assert len(rows) == 7
    for t, partitions, picture in ((int(t), int(count), keys) for t, count, keys in rows):
        assert compressed_at(t, config) == partitions
        raw_from = raw_start(partitions, config)
        names = ["s" if j < 2 and partitions else "k" if j < raw_from else "r" for j in range(t + 1)]
        assert "".join(name if seen else "." for name, seen in zip(names, mask[t, : t + 1], strict=True)) == picture


@pytest.mark.parametrize(
    "row", re.findall(r"^\| (\d+), (\d+) \|(.*)\|$", TEXT, re.MULTILINE), ids=lambda r: "-".join(r[:2])
)
def test_the_table_of_speed_ups_is_true(row):
    config = Rule(16, int(row[0]), int(row[1]))
    for length, cell in zip((8192, 32768, 131072), row[2].split("|"), strict=True):
        if cell.strip():
            ratio = attended_pairs(length, None) / attended_pairs(length, config)
            assert float(cell) == pytest.approx(ratio, abs=0.005)
