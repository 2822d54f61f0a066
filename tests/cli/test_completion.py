"""What the shell is told when the user presses the tabulator."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("argcomplete")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("lrsa fit --model.lrsa.compressor.help KeyD", {"KeyDiff"}),
        ("lrsa fit --config configs/model/ti", {"configs/model/tiny.yaml"}),
        ("lrsa test --bud", {"--budget"}),
        ("lrsa fit --data.hub_s", {"--data.hub_splits"}),
    ],
)
def test_names_are_completed_without_pytorch(line, expected, tmp_path):
    told = {"_ARGCOMPLETE": "1", "COMP_LINE": line, "COMP_POINT": str(len(line)), "_ARGCOMPLETE_IFS": "\n"}
    out = tmp_path / "out"
    code = "import sys; sys.modules['torch'] = None; from lrsa_lit.cli.main import main; main()"
    environment = os.environ | told | {"_ARGCOMPLETE_STDOUT_FILENAME": str(out)}
    run = subprocess.run([sys.executable, "-c", code], env=environment, cwd=tmp_path, check=False)
    assert run.returncode == 0
    assert {word.strip() for word in out.read_text().splitlines()} == expected
