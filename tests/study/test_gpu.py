"""A study on a GPU: kernels, graphs and mixed precision from end to end."""

import json

import pytest
import torch
import yaml
from study.conftest import STUDY

from lrsa_lit.attention import LRSACache, enable
from lrsa_lit.models.tiny import tiny_model
from lrsa_lit.ops.sparse_attention import LRSAConfig, RandomTokens
from lrsa_lit.study import settings
from lrsa_lit.study.evaluation import Greedy, dense_rule
from lrsa_lit.study.plan import Study
from lrsa_lit.study.runner import Runner

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

RULE = LRSAConfig(sink_size=2, lag_size=16, top_k=4)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("rule", [RULE, RULE.replace(compressor=RandomTokens()), None], ids=["rule", "random", "dense"])
def test_one_graph_answers_all_prompts(rule, rows):
    model = tiny_model().eval().cuda()
    enable(model, dense_rule(model) if rule is None else rule)
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randint(3, 259, (rows, length), generator=generator).cuda() for length in (90, 201, 60, 333)]
    greedy, graphs = Greedy(model, 24, 333), set()
    for batch in batches:
        for prompt, answer in zip(batch, greedy(batch, [2]), strict=True):
            options = {"do_sample": False, "max_new_tokens": 24, "eos_token_id": 2, "pad_token_id": 2}
            options["past_key_values"] = LRSACache.of(model)
            whole = model.generate(prompt[None], attention_mask=torch.ones_like(prompt)[None], **options)
            alone = whole[0, len(prompt) :].tolist()
            assert answer == (alone[: alone.index(2)] if 2 in alone else alone)
        (memory,) = greedy.memories.values()
        graphs.add(id(memory.decoder._graph))
    assert len(graphs - {id(None)}) == 1


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
