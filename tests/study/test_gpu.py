"""A study on a GPU: kernels, graphs and mixed precision from end to end."""

import json

import pytest
import torch
import yaml
from study.conftest import STUDY

from lrsa_lit.study import settings
from lrsa_lit.study.plan import Study
from lrsa_lit.study.runner import Runner

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_part_runs_in_mixed_precision_with_compiled_layers(workers, data, tmp_path):
    path = tmp_path / "study.yaml"
    changes = {
        "trainer": {"precision": "bf16-mixed", "max_steps": 12},
        "model": {"backbone": {"compile_layers": True}},
    }
    path.write_text(yaml.safe_dump(settings.merged(STUDY, changes)))
    runner = Runner(Study(str(path)), data, tmp_path / "results.jsonl", tmp_path / "work", 1e6, workers=workers)
    assert runner.run("main")
    lines = [json.loads(text) for text in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert {line["dtype"] for line in lines if line["kind"] == "evaluation"} == {"bfloat16"}
    training = [line for line in lines if line["kind"] == "training"]
    assert all(line["tokens_per_second"] > 0 and line["peak_memory_bytes"] > 0 for line in training)
