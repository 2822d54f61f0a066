"""The notebooks run on recorded runs, and the two files of each say the same."""

import json
import re
import sys

import jupytext
import nbformat
import numpy as np
import pytest
from cli_helpers import DEBUG
from experiments import tiny_study
from nbclient import NotebookClient

from lrsa_lit.analysis import runs
from lrsa_lit.cli.main import main
from lrsa_lit.cli.study import open_study
from lrsa_lit.experiments.questions import Questions, splits_of
from lrsa_lit.paths import shipped

NOTEBOOKS = shipped("notebooks/compare_runs.py").parent
HOME = "/home/you/lrsa-lit"
"""The checkout in stored outputs, wherever they were made."""
NAMES = sorted(path.stem for path in NOTEBOOKS.glob("*.py"))


def read(name):
    return nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A folder with the runs of two rules, one of them with two seeds and selections, and the notebooks' folder."""
    folder = tmp_path_factory.mktemp("checkout")
    (folder / "notebooks").mkdir()
    experiment = ["--trainer.logger.init_args.experiment_name", "quickstart"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("LRSA_CACHE_DIR", str(folder / "cache"))
        patch.setattr(sys, "argv", ["lrsa"])
        selections = ["--config", "configs/experiment/selections.yaml"]
        for options in ([], ["--seed_everything", "1"], ["--model.lrsa.top_k", "16"]):
            capture = selections if not options else []
            main(["fit", *DEBUG, *capture, *experiment, "--model.evaluate", "{}", *options])
    store = runs.open_store(f"sqlite:///{folder}/runs/mlflow.db")
    for number, run in enumerate(runs.table(store, "quickstart").index):
        # A random model answers nothing, so its scores are drawn.
        f1 = np.random.default_rng(number).integers(0, 2, 8).astype(float).tolist()
        rows = [
            dict.fromkeys(("id", "question", "gold"), f"text {n}")
            | {"LRSA": {"prediction": f"text {n}", "f1": score, "em": score}}
            for n, score in enumerate(f1)
        ]
        store.log_text(run, "".join(json.dumps(row) + "\n" for row in rows), runs.ANSWERS)
    study = folder / "configs" / "experiment" / "robustness.yaml"
    study.parent.mkdir(parents=True)
    opened = open_study(str(tiny_study.write(study)))
    Questions(opened, folder / "study" / "data").prepare(splits_of(opened.work(*opened.parts)))
    lines = tiny_study.RESULTS.read_text().replace('"study": "tiny-study"', '"study": "robustness"')
    (folder / "study" / "results.jsonl").write_text(lines)
    return folder


def kinds_shown(cells):
    """The richest type of what each code cell shows."""
    ranks = ("image/png", "text/html", "text/plain")
    shown = [{kind for output in cell.outputs for kind in output.get("data", {})} for cell in code_cells(cells)]
    return [next((kind for kind in ranks if kind in kinds), None) for kinds in shown]


def code_cells(cells):
    return [cell for cell in cells if cell.cell_type == "code"]


def executed(where):
    """The cells of each notebook, run by one kernel: to import what they use takes it longer than to run them."""
    forget, ends, cells = nbformat.v4.new_code_cell("%reset -f"), [0], []
    for name in NAMES:
        cells += [*read(name).cells, forget]
        ends.append(len(cells))
    resources = {"metadata": {"path": str(where)}}
    whole = nbformat.v4.new_notebook(cells=cells)
    run = NotebookClient(whole, timeout=60, kernel_name="python3", resources=resources).execute().cells
    return {name: run[start:end][:-1] for name, start, end in zip(NAMES, ends, ends[1:], strict=False)}


def test_notebooks_run_on_recorded_runs(checkout, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    done = executed(checkout / "notebooks")
    image, page, text = "image/png", "text/html", "text/plain"
    assert {name: kinds_shown(cells) for name, cells in done.items()} == {
        "attention_selections": [None, text, page, image, image, page, image, image, image, image],
        "compare_runs": [None, page, page, image, image, image, page, image, page, page],
        "robustness": [None, None, page, page, image, page, None, image, page, image, image, page, page, text],
    }
    outputs = [cell.outputs for cells in done.values() for cell in code_cells(cells)]
    said = {"".join(output.text for output in each if output.output_type == "stream") for each in outputs} - {""}
    store = f"Runs of {checkout / 'runs/mlflow.db'}\nExperiment quickstart, the latest; others: Default\n"
    parts = f"Results of {checkout / 'study/results.jsonl'}\n{', '.join(tiny_study.STUDY['parts'])}\n"
    assert said == {store, parts}, "noise"
    (chosen,) = [output for output in code_cells(done["attention_selections"])[1].outputs if "data" in output]
    assert chosen["data"][text] == "('tiny-L32-K8-s0', [0, 4])"
    (asked,) = code_cells(done["robustness"])[-1].outputs
    assert asked["data"][text] == "{'question': 'Which?', 'answers': ['a2', 'b']}"


@pytest.mark.parametrize("name", NAMES)
def test_the_two_files_of_a_notebook_are_in_step(name):
    written, kept = jupytext.read(NOTEBOOKS / f"{name}.py"), read(name)
    cells = [[(cell.cell_type, cell.source) for cell in notebook.cells] for notebook in (written, kept)]
    assert cells[0] == cells[1], f"run: jupytext --sync notebooks/{name}.py"


@pytest.mark.parametrize("name", NAMES)
def test_notebooks_hold_the_outputs_of_one_run_and_define_nothing(name):
    text = (NOTEBOOKS / f"{name}.ipynb").read_text(encoding="utf-8")
    assert set(re.findall(r"/\w+/[\w/.-]+\.(?:db|jsonl)", text)) <= {
        f"{HOME}/runs/mlflow.db",
        f"{HOME}/study/results.jsonl",
    }
    for number, cell in enumerate(code_cells(read(name).cells), 1):
        assert cell.execution_count == number, "run: make notebooks"
        assert {output.output_type for output in cell.outputs} <= {"stream", "display_data", "execute_result"}
        assert not [
            line for line in cell.source.splitlines() if line.lstrip().startswith(("def ", "class ", "lambda "))
        ]
