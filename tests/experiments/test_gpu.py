"""A study on a GPU: kernels, graphs and mixed precision from end to end."""

import pytest
import torch
from experiments import tiny_study
from experiments.executors import InProcess
from experiments.tiny_study import STUDY, merged

from lrsa_lit.cli.study import open_study
from lrsa_lit.experiments.questions import Questions
from lrsa_lit.experiments.results import Results
from lrsa_lit.experiments.runner import Runner

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def test_a_part_runs_in_mixed_precision_with_compiled_layers(data, tmp_path):
    trainer = {"precision": "bf16-mixed", "max_steps": 12, "accelerator": "gpu", "logger": False}
    model = merged(STUDY["model"], {"backbone": {"compile_layers": True}})
    study = open_study(str(tiny_study.write(tmp_path / "tiny-study.yaml", trainer=trainer, model=model)))
    run = Runner(study, Questions(study, data), Results(tmp_path / "results.jsonl", study), tmp_path / "work")
    assert run.run(run.chosen(["main"]), InProcess())
    lines = run.results.lines
    assert {line["dtype"] for line in lines if line["kind"] == "evaluation"} == {"bfloat16"}
    training = [line for line in lines if line["kind"] == "training"]
    assert all(line["tokens_per_second"] > 0 and line["peak_memory_bytes"] > 0 for line in training)
