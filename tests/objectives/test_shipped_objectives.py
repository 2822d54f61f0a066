"""The objectives in configs/: each YAML makes one that trains, and each class has a YAML."""

from pathlib import Path

import yaml
from cli_helpers import DEBUG, NO_LOGGER, refusal
from cli_helpers import elsewhere as elsewhere

from lrsa_lit import plugins
from lrsa_lit.cli.main import main
from lrsa_lit.models.checkpoint import load_trained

CONFIGS = sorted((Path(__file__).parents[2] / "configs" / "objective").glob("*.yaml"))
PAIRS = ["--data", "PreferencePairs", "--data.init_args.train", "data/sample-pairs.jsonl"]
FIT = ["fit", *DEBUG, *NO_LOGGER, "--validate_first", "false", "--data.init_args.val", "null", "--trainer.max_steps"]


def class_paths(value):
    """All that settings name."""
    if isinstance(value, list):
        return [path for each in value for path in class_paths(each)]
    if not isinstance(value, dict):
        return []
    return [value[key] for key in value if key == "class_path"] + class_paths(list(value.values()))


def test_every_objective_has_a_config():
    named = {path for config in CONFIGS for path in class_paths(yaml.safe_load(config.read_text()))}
    classes = plugins.registered("objectives").items()
    assert named == {f"lrsa_lit.objectives.{name}" for name, cls in classes if cls.__module__.startswith("lrsa_lit.")}


def test_two_answers_are_compared_where_the_data_has_two(capfd):
    line = refusal(capfd, *FIT, "1", "--config", "configs/objective/odds_ratio.yaml")
    assert line.startswith("model.objective: OddsRatio needs two answers to each prompt, and QAFiles has one; ")


def trained(folder, *options):
    main([*FIT, "1", *options, "--trainer.default_root_dir", folder])
    return load_trained(Path(folder, "checkpoints/last.ckpt")).weights["model.layers.0.mlp.up_proj.weight"]


def test_a_shipped_objective_trains():
    trained("runs/dense", "--model.train_attention", "null")  # the teacher that a YAML names
    main(["distil-cache", *FIT[1:], "1", "--config", "configs/objective/cached_teacher.yaml"])
    found = {config.stem: trained(config.stem, *PAIRS * (config.stem == "odds_ratio"), "--config", str(config))
             for config in CONFIGS}  # fmt: skip
    default = trained("default")
    assert [name for name, weight in found.items() if weight.equal(default)] == ["answers"]
