"""A study runs where only the libraries that train are installed."""

import subprocess
import sys

MISSING = ("datasets", "jsonargparse", "matplotlib", "mlflow", "omegaconf", "pandas", "pyarrow", "torchdata")

# As if they were not installed: neither found nor imported.
HIDDEN = f"""
import importlib.abc, importlib.metadata, importlib.util, sys
MISSING = {MISSING!r}

class Hider(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in MISSING:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Hider())
find_spec, version = importlib.util.find_spec, importlib.metadata.version
importlib.util.find_spec = lambda name, *rest: None if name.partition(".")[0] in MISSING else find_spec(name, *rest)

def no_version(name):
    if name in MISSING:
        raise importlib.metadata.PackageNotFoundError(name)
    return version(name)

importlib.metadata.version = no_version
from lrsa_lit.cli.main import main
main(sys.argv[1:])
assert not set(MISSING) & {{name.partition(".")[0] for name in sys.modules}}
"""


def test_a_part_runs_without_what_reads_data_and_parses_commands(study_file, data, tmp_path):
    out = tmp_path / "results.jsonl"
    arguments = ["run", str(study_file), "--part", "main", "--data", str(data), "--out", str(out)]
    command = [sys.executable, "-c", HIDDEN, "study", *arguments, "--work", str(tmp_path / "work")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "main: done" in done.stdout
    assert len(out.read_text().splitlines()) == 10


def test_the_module_is_the_command(study_file, data, tmp_path):
    arguments = ["status", str(study_file), "--part", "all", "--data", str(data), "--out", str(tmp_path / "r.jsonl")]
    done = subprocess.run([sys.executable, "-m", "lrsa_lit.study", *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "mixed, seed 1" in done.stdout
    done = subprocess.run([sys.executable, "-m", "lrsa_lit.study", "status"], capture_output=True, text=True)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
