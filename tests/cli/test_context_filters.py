"""Context filters from YAML and on the command line."""

import importlib.util
import json

import pytest
import yaml
from cli_helpers import DEBUG, NO_LOGGER, recorded_runs, refusal

from lrsa_lit import plugins
from lrsa_lit.cli.main import main
from lrsa_lit.data.filters.filter_measures import MEASURES
from lrsa_lit.paths import shipped

SHORT = ["--model.max_new_tokens", "2", "--data.limit", "{test: 2}", "--trainer.enable_progress_bar", "false"]
TEST = ["test", *DEBUG, *SHORT]
FILES = sorted(path.name for path in shipped("configs/filter/bm25.yaml").parent.iterdir())


def test_shipped_files_name_shipped_filters():
    known = plugins.registered("filters")
    for name in FILES:
        named = yaml.safe_load(shipped(f"configs/filter/{name}").read_text())["data"]["init_args"]["filter"]
        assert named["class_path"].rpartition(".")[2] in known


def test_what_a_filter_left_is_shown_and_recorded(tmp_path, capfd):
    main([*TEST, "--config", "configs/filter/bm25.yaml"])
    shown = capfd.readouterr().out
    assert "What the context filter left" in shown
    # The sample names no supporting sentences, and summaries are another filter's.
    hidden = [name for name, label in MEASURES.items() if label not in shown]
    assert hidden == ["supporting_recall", "without_summary"]
    filtered = json.loads(next(tmp_path.rglob("answers.json")).read_text())["filtered"][""]
    assert 0 < filtered["context_tokens_left"] <= filtered["context_tokens"] / 4
    (run,) = recorded_runs(tmp_path / "runs/mlflow.db", "debug")
    recorded = {name: value for name, value in run.data.metrics.items() if name.startswith("test/context/")}
    assert recorded == pytest.approx({f"test/context/{name}": value for name, value in filtered.items()}, rel=1e-4)


def test_flags_take_a_filter_and_none_leaves_no_trace(tmp_path, capfd):
    main([*TEST, *NO_LOGGER, "--data.filter", "Truncate", "--data.filter.tokens", "60"])
    (about,) = tmp_path.rglob("answers.json")
    assert json.loads(about.read_text())["filtered"][""]["context_tokens_left"] <= 60
    about.unlink()
    main([*TEST, *NO_LOGGER])
    assert "context filter" not in capfd.readouterr().out.split("Answers: ")[1]
    assert json.loads(next(tmp_path.rglob("answers.json")).read_text())["filtered"] == {}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["Truncate", "--data.filter.tokens", "0"], "data.init_args.filter.init_args.tokens: 0 is not allowed"),
        (["BM25", "--data.filter.rule", "loose"], "filter: rule: Expected"),
        (
            ["RandomSentences", "--data.filter.tokens", "1"],
            "data.init_args.filter.init_args.tokens: 1 leaves no context",
        ),
        (["Truncated"], "Truncated is not a known class"),
    ],
)
def test_a_mistake_is_one_line(given, said, capfd):
    assert said in refusal(capfd, *TEST, *NO_LOGGER, "--data.filter", *given)


def test_texts_have_no_context_to_filter(capfd):
    arguments = ["--config", "configs/data/texts.yaml", "--data.max_tokens", "64", "--data.filter", "Truncate"]
    said = refusal(capfd, *TEST, *NO_LOGGER, *arguments)
    assert said.startswith(
        "data.init_args.filter: 'Truncate' cannot be used: TextFiles has no questions about passages"
    )
    assert said.endswith("leave it out, or set it to null")


def test_a_tagger_that_is_not_installed_is_named_with_the_remedy(capfd, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "textblob" else find(name, *rest)
    )
    said = refusal(capfd, *TEST, *NO_LOGGER, "--data.filter", "POSPriorityChunks")
    assert "needs textblob, which is not installed; pip install 'lrsa-lit[tagger]'" in said
