"""`lrsa compare` and `lrsa test --budget`, with the tiny model."""

import contextlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from cli_helpers import DEBUG, NO_LOGGER, recorded_runs, refusal
from experiments.executors import InProcess

from lrsa_lit.attention import LRSAConfig
from lrsa_lit.cli.main import main
from lrsa_lit.cli.study import fit_settings
from lrsa_lit.errors import UserError
from lrsa_lit.experiments import on_ray
from lrsa_lit.experiments.comparison import Asked, study_of
from lrsa_lit.experiments.product_names import products_of
from lrsa_lit.experiments.results import read_lines
from lrsa_lit.systems import KeyNorm
from lrsa_lit.tasks.measures import MEASURES

TOKENS = 640
COMPARE = ["compare", "--model", "tiny", "--data", "qa.yaml", "--lag-size", "16", "--to", "out"]


@pytest.fixture(autouse=True)
def questions(elsewhere):
    """A data set of three questions in contexts of about 550 tokens."""
    lines = []
    for number in range(3):
        text = f"Town {number} lies on a river. {'More words follow here. ' * 15}Its word is w{number}."
        passages = [{"title": f"Town {number}", "text": text}]
        lines.append({"id": str(number), "passages": passages, "question": f"Word of {number}?", "answers": ["w"]})
    Path("q.jsonl").write_text("\n".join(map(json.dumps, lines)))
    arguments = {"max_tokens": TOKENS, "train": None, "val": None, "test": "q.jsonl"}
    data = {"data": {"class_path": "lrsa_lit.data.QAFiles", "init_args": arguments}, "model": {"max_new_tokens": 3}}
    Path("qa.yaml").write_text(yaml.safe_dump(data))


@pytest.fixture
def in_process(monkeypatch):
    """Evaluations run in this process, in which these commands ran."""
    runs = InProcess()
    monkeypatch.setattr(on_ray, "executor", lambda on, jobs: contextlib.nullcontext(runs))
    return runs.ran


def test_systems_and_rule_are_compared_at_budgets_and_go_on(in_process, monkeypatch, capfd):
    # One that holds everything and reads less.
    monkeypatch.setattr(KeyNorm, "budget_field", "")
    monkeypatch.setattr("lrsa_lit.systems.one_shot.OneShotStream.read_share", 0.25)
    arguments = [
        *COMPARE,
        "--systems",
        "KeyNorm={kept: 1.0}",
        "LagRelative",
        "--budgets",
        "0.5",
        "0.25",
        "--limit",
        "2",
    ]
    main([*arguments, "--data-only"])
    assert "qa/test: 2 examples" in capfd.readouterr().out
    assert not in_process
    assert not Path("out/results.jsonl").exists()
    main(arguments)
    lines = read_lines(Path("out/results.jsonl"))
    names = ["dense", "KeyNorm", "rule-LagRelative-at-320-of-640", "rule-LagRelative-at-160-of-640"]
    assert [line["attention"] for line in lines] == names
    assert all(line["questions"] == 2 and set(MEASURES) >= set(line["measured"]) for line in lines)
    dense, holding, half, quarter = (line["measured"] for line in lines)
    assert dense["cache"] == dense["peak"] == dense["pairs"] == dense["kept"] == 1.0
    assert (holding["cache"], holding["read"]) == (1.0, 0.25)
    assert 0.2 < quarter["cache"] < half["cache"] < 0.65
    assert lines[-1]["rule"] | {"top_k": 0, "lag_size": 16} == LRSAConfig(lag_size=16, top_k=0).to_dict()
    report = Path("out/README.md").read_text()
    assert "| rule-LagRelative | 25% | 0.000" in report
    assert report.index("read or attend to less") < report.index("| KeyNorm |  | 0.000")
    assert Path("out/qa.png").stat().st_size
    shown = capfd.readouterr().out
    assert "first token (ms)" in shown
    (run,) = [run for run in recorded_runs(Path("out/mlflow.db"), "lrsa") if "study.row" in run.data.tags]
    assert run.data.metrics["test/dense/cache"] == 1.0
    assert len(in_process) == 1
    # What another file asks for does not lengthen the answers of this one.
    assert yaml.safe_load(Path("out/out.yaml").read_text())["data_sets"]["qa"]["max_new_tokens"] == 3
    assert "Nothing was left" not in shown
    main([*arguments, "--no-mlflow"])
    assert len(in_process) == 1
    assert "Nothing was left to evaluate: out/results.jsonl has all results\n" in capfd.readouterr().out


def test_other_questions_in_the_same_file_are_evaluated(in_process, capfd):
    asked = [*COMPARE, "--systems", "KeyNorm", "--budgets", "0.5", "--no-mlflow"]
    main(asked)
    Path("q.jsonl").write_text(Path("q.jsonl").read_text().replace("word is w1", "word is v1"))
    main(asked)
    assert len(in_process) == 2
    first, *_, last = read_lines(Path("out/results.jsonl"))
    assert first["set_digest"] != last["set_digest"]
    assert Path("out/README.md").read_text().count("\n| KeyNorm | 50% |") == 1


def test_a_system_may_be_there_twice_with_the_question_seen_and_not(in_process, capfd):
    asked = ["--systems", "KeyNorm", "KeyNorm={question: true}", "--budgets", "0.5", "--limit", "1"]
    main([*COMPARE, *asked, "--no-mlflow"])
    _, behind_context, behind_question = read_lines(Path("out/results.jsonl"))
    assert behind_context["attention"] == "KeyNorm-at-320-of-640"
    assert behind_question["attention"] == "KeyNorm-q-at-320-of-640"
    assert [line["rule"]["system"]["init_args"]["question"] for line in (behind_context, behind_question)] == [
        False,
        True,
    ]
    assert behind_context["measured"]["cache"] == behind_question["measured"]["cache"]
    assert behind_context["loss"] != behind_question["loss"]
    report = Path("out/README.md").read_text()
    assert "\n| KeyNorm | 50% |" in report
    assert "\n| KeyNorm [q] | 50% |" in report
    assert "KeyNorm [q]" in capfd.readouterr().out


def test_an_evaluation_is_set_to_a_budget(capfd):
    settings = [
        "--config",
        "qa.yaml",
        "--model.backbone.source",
        "tiny",
        *NO_LOGGER,
        "--model.generate_answers",
        "false",
    ]
    rule = ["--model.lrsa.lag_size", "16", "--model.lrsa.top_k", "4"]
    main(["test", *settings, *rule, "--cache-tokens", "160"])
    about = json.loads(next(Path("runs").rglob("answers.json")).read_text())
    own = LRSAConfig.from_dict(about["attentions"]["LRSA"]["rule"])
    # 16 sinks, a window of 32 and 37 partitions.
    assert own.top_k == 3
    assert about["attentions"]["dense"]["rule"] is None
    said = refusal(capfd, "test", *settings, *rule, "--budget", "0.05")
    floor = "at least 0.0750 for LagRelative at 640 tokens, where 16 sinks and 32 window tokens are always kept"
    assert said == f"budget: 0.05 is not allowed; it must be {floor}"
    said = refusal(capfd, "test", *settings, *rule, "--cache-tokens", "32")
    assert said == f"cache_tokens: 32 is not allowed; it must be a share of 640 tokens that is {floor}"
    assert refusal(capfd, "test", *settings, "--budget", "0.5", "--cache-tokens", "9").startswith(
        "budget, cache_tokens:"
    )


def test_all_leaves_out_a_compressor_that_answers_as_another_does():
    products, left_out = products_of(["all"], LRSAConfig())
    assert "rule-LagRelative" in [product.words for product in products]
    assert [line for line in left_out if line.startswith("rule-")] == [
        "rule-StraightThrough is left out: compressor: it answers as rule-LagRelative does",
        "rule-TokenGate is left out: compressor: its gates are random without a file of weights; "
        "`lrsa token-gates` writes one",
    ]
    (product,), _ = products_of(["StraightThrough"], LRSAConfig())
    assert product.words == "rule-StraightThrough"


def test_all_leaves_out_a_low_rank_of_a_checkpoint():
    asked = Asked("tiny", ["qa.yaml"], [0.25], ["all"], checkpoint=Path("trained.ckpt"), lag_size=16)
    content, left_out = study_of(asked, fit_settings())
    assert [line for line in left_out if line.startswith("LoRC is left out: --checkpoint")]
    assert not [name for name in content["rows"] if "LoRC" in name]
    with pytest.raises(UserError) as error:
        study_of(replace(asked, systems=["LoRC"]), fit_settings())
    assert error.value.field == "--checkpoint"


def test_filters_low_rank_and_products_are_compared_at_equal_bytes(in_process, capfd):
    systems = ["BM25", "LoRC", "BM25@0.6*LagRelative", "LoRC@0.6*LagRelative"]
    asked = [*COMPARE, "--systems", *systems, "--budgets", "0.4", "--limit", "2", "--no-mlflow"]
    main(asked)
    lines = read_lines(Path("out/results.jsonl"))
    names = {(line["set"], line["attention"]): line for line in lines}
    at = "-at-256-of-640"
    products = {
        "BM25": names["qa-BM25-0.4", "dense"],
        "LoRC": names["qa", f"LoRC{at}"],
        "BM25 to 60%, then rule-LagRelative": names["qa-BM25-0.6", f"BM25_to_60_then_rule-LagRelative{at}"],
        "LoRC-head to 60%, then rule-LagRelative": names["qa", f"LoRC-head_to_60_then_rule-LagRelative{at}"],
        "Truncate": names["qa-Truncate-0.4", "dense"],
        "RandomSentences": names["qa-RandomSentences-0.4", "dense"],
    }
    assert len(lines) == 1 + len(products)
    dense = names["qa", "dense"]
    assert all(line["ids_digest"] == dense["ids_digest"] and line["questions"] == 2 for line in lines)
    # Prompts are of 476 tokens, fewer than the 640 of the budget, of which the rule's sinks and window are fixed.
    assert products["BM25"]["measured"]["cache"] <= 0.4
    assert products["Truncate"]["measured"]["cache"] == pytest.approx(0.4, abs=0.005)
    assert products["LoRC"]["measured"]["cache"] == pytest.approx(0.4, abs=0.02)
    assert products["LoRC"]["measured"]["cache"] <= 0.4
    assert all(line["measured"]["cache"] < 0.55 for line in products.values())
    half = products["BM25 to 60%, then rule-LagRelative"]["measured"]
    assert half["cache"] < 0.6 < 1.0 == dense["measured"]["cache"]
    report = Path("out/README.md").read_text()
    assert all(f"\n| {name} | 40% |" in report for name in products)
    assert "baselines with dense attention" in report
    rows = {line.split(" | ")[0].removeprefix("| "): line for line in report.splitlines() if line.startswith("| ")}
    assert " no |" in rows["BM25"]
    assert " yes |" in rows["LoRC"]
    # The difference to dense attention is paired over the same questions, whose prompts differ.
    assert rows["BM25"].split(" | ")[3]
    assert "Truncate" in capfd.readouterr().out
    ran = len(in_process)
    main(asked)
    assert len(in_process) == ran


def test_a_filter_that_leaves_no_sentence_is_refused(in_process, capfd):
    said = refusal(capfd, *COMPARE, "--systems", "BM25", "--budgets", "0.05", "--limit", "1", "--no-mlflow")
    assert said.startswith("data_sets.qa-BM25-0.05.")
    assert "leaves no context" in said
    assert not in_process


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--systems", "Nothing*BM25"], "--systems: 'Nothing' is not allowed; it must be all, or some of rule-"),
        (["--systems", "BM25*LoRC"], "--systems: 'BM25*LoRC' BM25 and LoRC have no share; give all but one of them"),
        (["--systems", "BM25@0.5*LoRC@0.5"], "--systems: 'BM25@0.5*LoRC@0.5' each factor has a share; give all but"),
        (["--systems", "BM25@0.5"], "--systems: 'BM25@0.5' has a share, but is not a product"),
        (["--systems", "BM25@2*LoRC"], "--systems: 'BM25@2*LoRC' is not allowed; it must be NAME@SHARE with a share"),
        (["--systems", "BM25@0.5*Truncate"], "--systems: 'BM25@0.5*Truncate' has two factors of the same kind, BM25"),
        (
            ["--systems", "BM25@0.5*LoRC", "--budgets", "0.5"],
            "--systems: 'BM25@0.5*LoRC' keeps only 0.5 without LoRC, which then has nothing to save at the budget 0.5",
        ),
        (
            ["--systems", "BM25@0.6*LagRelative", "--budgets", "0.05"],
            "--systems BM25@0.6*LagRelative at 0.05: 0.0833 is not allowed; it must be at least 0.1250 for LagRelative",
        ),
        (["--systems", "LoRC@0.6*KeyNorm"], "--systems: 'LoRC@0.6*KeyNorm' saves nothing with its low rank: a cache"),
        (["--systems", "LoRC={grouping: joint}@0.6*LagRelative"], "--systems: 'LoRC={grouping: joint}@0.6*LagRelati"),
        (["--systems", "LoRC={ratio: 0.5}"], "--systems LoRC.ratio: 0.5 is set by the budget"),
        (["--systems", "LoRC={rang: 5}"], "--systems LoRC.rang: is unknown; it must be one of dense_layers"),
        (["--systems", "LoRC={min_share: 5}"], "--systems LoRC"),
        (["--systems", "LoRC", "--budgets", "0.01"], "--budgets: 0.01 is not allowed; it must be at least 0.0469 for"),
        (["--systems", "BM25={kept: 0.5}"], "--systems BM25: kept, tokens and of are set by the budget"),
        (["--systems", "BM25={k1: -1}"], "--systems BM25.k1: -1 is not allowed; it must be a number >= 0"),
        (["--systems", "CPC"], "--systems CPC: 'CPC' does not take these init_args"),
        (["--budgets", "1.5"], "--budgets: '1.5' is not allowed; it must be a number above 0 and at most 1"),
        (["--budgets", "0"], "--budgets: '0' is not allowed; it must be a number above 0 and at most 1"),
        (
            ["--budgets", "0.05"],
            "--budgets: 0.05 is not allowed; it must be at least 0.0750 for LagRelative",
        ),
        (["--systems", "Nothing"], "--systems: 'Nothing' is not allowed; it must be all, or some of rule-"),
        (["--systems", "KeyNorm", "KeyNorm"], "--systems: 'KeyNorm' appears twice"),
        (["--systems", *["KeyNorm={question: true}"] * 2], "--systems: 'KeyNorm [q]' appears twice"),
        (["--systems", "KeyNorm={question: 1}"], "--systems KeyNorm.question: 1 is not allowed; it must be true or"),
        (["--systems", "KeyNorm={pairs: 5}"], "--systems KeyNorm.pairs: 5 is set by the budget"),
        (["--systems", "KeyNorm={kept: 0.1}"], "--systems KeyNorm.kept: 0.1 is set by the budget"),
        (["--systems", "Cascade={window: 64}"], "--systems Cascade.window: 64 is set by the budget"),
        (["--systems", "KeyNorm={size: 1}"], "--systems KeyNorm: 'KeyNorm' does not take these init_args"),
        (
            ["--systems", "KeyNorm={no: 1}"],
            "--systems KeyNorm: False is not allowed; it must be a name; YAML reads no,",
        ),
        (["--systems", "KeyNorm=kept"], "--systems: 'KeyNorm=kept' is not allowed; it must be NAME, or NAME={"),
        (["--data", "no.yaml"], "--data: "),
        (["--data", "configs/data/mixture.yaml"], "--data: 'configs/data/mixture.yaml' is a mixture"),
        (["--data", "configs/model/tiny.yaml"], "--data: 'configs/model/tiny.yaml' holds no data set"),
        (
            ["--data", "mine.jsonl"],
            "--data: 'mine.jsonl' holds the data itself; it must be a file of settings, such as",
        ),
        (["--checkpoint", "no.ckpt"], "--checkpoint: 'no.ckpt' does not exist"),
        (["--limit", "0"], "--limit: '0' is not allowed"),
        (["--jobs", "0"], "--jobs: '0' is not allowed"),
        (["--jobs", "2", "--on", "ray"], "--on"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_line(arguments, said, capfd):
    assert refusal(capfd, *COMPARE, *arguments).startswith(said)


def test_a_mistake_in_a_data_set_names_its_argument(capfd):
    data = yaml.safe_load(Path("qa.yaml").read_text())
    data["data"]["init_args"]["batch_size"] = 0
    Path("qa.yaml").write_text(yaml.safe_dump(data))
    said = refusal(capfd, *COMPARE, "--systems", "KeyNorm")
    assert said.startswith("data_sets.qa.init_args.batch_size: 0 is not allowed")
    assert "Namespace" not in said


def test_a_budget_is_a_number(capfd):
    for flag, value, kind in (("budget", "True", "float"), ("budget", "nan", "float"), ("cache_tokens", "1.5", "int")):
        said = refusal(capfd, "test", *DEBUG, *NO_LOGGER, f"--{flag}", value)
        assert said == f"{flag}: {value} is not allowed; it must be of type {kind}"


def test_a_fit_has_no_budget(capfd):
    assert "budget" in refusal(capfd, "fit", *DEBUG, *NO_LOGGER, "--budget", "0.5")
