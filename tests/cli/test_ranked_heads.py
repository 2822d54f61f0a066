"""Heads by a ranking, at a share of the cache, in the settings of fits and studies."""

import json
from pathlib import Path

import pytest
import yaml
from cli_helpers import DEBUG, NO_LOGGER, refusal
from experiments.tiny_study import STUDY, merged

from lrsa_lit.cli.main import main
from lrsa_lit.models.checkpoint import load_trained

SHIPPED = ["--config", "configs/experiment/ranked_heads.yaml"]
FIT = ["fit", *DEBUG, *NO_LOGGER, *SHIPPED, "--validate_first", "false", "--data.init_args.val", "null"]


@pytest.fixture(autouse=True)
def _ranking(elsewhere):
    Path("runs").mkdir()
    Path("runs/heads.json").write_text(json.dumps({"worths": [[0.1, 0.9], [0.7, 0.2]]}))


def asked(budget, tokens=4096):
    return f"{{ranking: runs/heads.json, budget: {budget}, tokens: {tokens}}}"


def test_a_model_is_distilled_under_heads_of_a_ranking():
    main([*FIT, "--trainer.max_steps", "1", "--model.lrsa.head_top_k", asked(0.6)])
    trained = load_trained(Path("runs/checkpoints/last.ckpt"))
    assert trained.rule["head_top_k"] == [[3, 64], [64, 3]]


@pytest.mark.parametrize("key", ["lrsa", "train_attention"])
def test_a_share_that_cannot_be_met_is_told_before_the_fit(key, capfd):
    error = refusal(capfd, *FIT, f"--model.{key}", f"{{lag_size: 64, head_top_k: {asked(0.05)}}}")
    assert error.startswith(f"model.{key}.head_top_k.budget: 0.05 is not allowed; it must be at least 0.")
    assert not Path("runs/checkpoints").exists()


@pytest.mark.parametrize(
    ("attention", "said"),
    [
        ({"head_top_k": {"ranking": "runs/other.json", "budget": 0.9, "tokens": 1024}},
         "head_top_k: has K of 3 layers x 1 heads; the model has 2 layers x 2 heads"),
        ({"system": {"class_path": "DuoAttention", "init_args": {"gates": "runs/other.json"}}},
         "system.init_args.gates: has gates of 3 layers x 1 heads; the model has 2 x 2"),
    ],
    ids=["budgets", "system"],
)  # fmt: skip
def test_a_ranking_of_another_model_is_told_before_anything_is_loaded(attention, said, capfd):
    Path("runs/other.json").write_text("[[0.1], [0.9], [0.5]]")
    changes = {
        "rows": {"ranked": {"model": {"train_attention": attention}}},
        "parts": {"main": {"rows": ["dense", "lrsa", "ranked"]}},
    }
    Path("study.yaml").write_text(yaml.safe_dump(merged(STUDY, changes), sort_keys=False))
    error = refusal(capfd, "study", "run", "study.yaml", "--part", "main")
    assert error == f"rows.ranked.model.train_attention.{said}"
    Path("rule.yaml").write_text(yaml.safe_dump({"model": {"train_attention": attention}}))
    error = refusal(capfd, "fit", *DEBUG, *NO_LOGGER, "--config", "rule.yaml")
    assert error == f"model.train_attention.{said}"


@pytest.mark.parametrize(
    ("where", "changes"),
    [
        ("rows.ranked.model.train_attention", {"rows": {"ranked": {"model": {"train_attention": {}}}}}),
        ("inference.ranked", {"inference": {"ranked": {}}}),
    ],
)
def test_a_study_tells_it_before_the_first_training(where, changes, capfd):
    attention = {"head_top_k": {"ranking": "runs/heads.json", "budget": 0.05, "tokens": 1024}}
    *above, last = where.split(".")
    parent = changes
    for name in above:
        parent = parent[name]
    parent[last] = attention
    Path("study.yaml").write_text(yaml.safe_dump(merged(STUDY, changes), sort_keys=False))
    error = refusal(capfd, "study", "run", "study.yaml", "--part", "main")
    assert f"{where}.head_top_k.budget: 0.05 is not allowed" in error
    # 2 sinks, 8 of each of 30 partitions, and 62 of the window.
    assert "at least 0.2969 at 1024 tokens, where K = 8 holds 304 pairs per head" in error
