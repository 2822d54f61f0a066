"""The studies that ship: complete, and what their names and texts say."""

import math
from types import SimpleNamespace

import pytest
import yaml
from experiments.shipped_studies import CLAIM, NARROW, OBJECTIVES, ROOT, SHIPPED, opened

from lrsa_lit.attention import LRSAConfig, cache_share
from lrsa_lit.cli.fit_settings import FitSettings
from lrsa_lit.cli.main import main
from lrsa_lit.experiments.report.bars import Bars
from lrsa_lit.experiments.report.cells import Cells
from lrsa_lit.experiments.results import read_lines
from lrsa_lit.models import LowRank
from lrsa_lit.models.flops import kv_ratio
from lrsa_lit.systems.system import Head
from lrsa_lit.yaml_file import read_settings


@pytest.mark.parametrize(
    ("shipped", "first"), [(SHIPPED, "main"), (OBJECTIVES, "main"), (CLAIM, "selectors"), (NARROW, "untrained")]
)
def test_the_shipped_studies_are_complete(shipped, first):
    study = opened(shipped)
    used = {name for part in study.parts.values() for name in part["rows"]}
    assert used == set(study.rows)
    for part in study.parts:
        assert list(study.work(part))
    assert len({row.hash for row in study.rows.values()}) == len(study.rows)
    first_line = (ROOT / shipped).read_text().splitlines()[0]
    assert first_line.startswith(f"# lrsa study run {shipped} --part {first} ")
    Bars(Cells(study, []))


def test_the_results_that_are_kept_are_those_of_the_shipped_rows():
    study = opened(SHIPPED)
    found = {line["config"] for line in read_lines(ROOT / "study" / "results.jsonl")}
    # One was never run.
    assert [row.name for row in study.rows.values() if row.hash not in found] == ["pairs13-chosen2"]


def test_the_shipped_objectives_differ_in_nothing_else():
    study = opened(OBJECTIVES)
    by_name = {name: row.trained_by() for name, row in study.rows.items()}
    for name in study.parts["main"]["rows"][1:]:
        assert {**by_name[name], "objective": None} == {**by_name["answers"], "objective": None}
    assert kv_ratio(study.inference["rule"], 4080, 30) == pytest.approx(0.325, abs=0.001)
    assert [row.name for row in study.rows.values() if row.needs] == [
        "kl-dense", "kl-hidden", "keydiff-kl", "recency-kl", "answers-from-dense", "kl-self-from-dense"]  # fmt: skip
    assert study.row("kl-dense").needs == (study.row("dense"),)
    assert study.row("kl-self-from-dense").needs == (study.row("dense-half"),)
    shipped = read_settings(ROOT / "configs" / "objective" / "distillation.yaml")
    assert by_name["kl-self"]["objective"] == shipped["model"]["objective"]


def test_the_claim_is_held_to_the_settings_of_the_studies_before_it():
    study, before = opened(CLAIM), opened(OBJECTIVES)
    rows, older = ({name: row.trained_by() for name, row in each.rows.items()} for each in (study, before))
    # But for passkeys and the start, these are the rows of the other study.
    data = rows["dense-hotpotqa"]["data"]
    assert rows["dense-hotpotqa"] == older["dense"]
    assert {**rows["dense"], "data": data} == older["dense"]
    start = {"start_from": rows["answers"]["start_from"]}
    assert {**rows["answers"], "data": data} == older["answers"] | start
    assert rows["distilled"]["objective"] == older["kl-self-from-dense"]["objective"]
    # Rows that are compared differ in nothing but the rule and the objective.
    compared = [name for name in study.rows if name.startswith(("answers", "distilled")) and not name.endswith("16k")]
    compared.remove("distilled-base")
    ignored = {"attention": None, "objective": None}
    assert {str(rows[name] | ignored) for name in compared} == {str(rows["answers"] | ignored)}
    for name in compared:
        assert study.row(name).needs == (study.row("dense"),)
    assert study.row("distilled-base").needs == ()
    for name in ("hotpotqa", "hotpotqa_all"):
        assert study.data_set(name) == before.data_set(name)
    squad = opened(SHIPPED).data_set("qa_squad_all")
    assert study.data_set("squad") == squad


def test_what_the_claim_compares_holds_what_its_names_say():
    study, head = opened(CLAIM), Head(3, 64, 2)
    shares = {name: rule and cache_share(rule, 4096, 30, head) for name, rule in study.inference.items()}
    alike = [shares[name] for name in ("lag", "keydiff", "tail", "recency", "random", "strided")]
    assert alike == [pytest.approx(0.297, abs=0.001)] * 6
    assert shares["8x"] == shares["8x-keydiff"] == shares["8x-random"] == pytest.approx(0.18, abs=0.001)
    assert 0.24 < shares["cache25-layers"] <= 0.25
    assert 0.12 < shares["cache13-layers"] <= 0.125
    for name, data_set in study.data_sets.items():
        positions = 4 * 8192 if name in ("hotpotqa_16k", "hotpotqa_32k") else 8192
        assert data_set["init_args"]["max_tokens"] + data_set.get("max_new_tokens", 24) <= positions


def test_narrow_caches_hold_what_the_names_of_their_rows_say():
    study = opened(NARROW)

    def held(row, attention):
        """Of the bytes of a dense cache of 4,096 tokens, in bfloat16 and SmolLM2's shape; a position takes 4."""
        config = SimpleNamespace(hidden_size=576, num_attention_heads=9, num_key_value_heads=3, num_hidden_layers=30)
        low_rank = study.row(row).settings["model"]["backbone"].get("low_rank")
        latent = low_rank and LowRank(**low_rank).latent_bytes(config, 2)
        return cache_share(study.inference[attention], 4096, 30, Head(3, 64, 2, latent))

    for row, share in {"narrow67": 0.67, "narrow50": 0.5, "narrow33": 0.33, "narrow50-head": 0.5}.items():
        assert held(row, "latents") == pytest.approx(share, abs=0.02)
    assert held("4x-narrow50-shared", "4x-shared-latents") < held("4x-narrow50-head", "4x-latents") < 0.16
    assert 0.17 < held("8x", "8x") < 0.19


def test_the_shares_of_the_shipped_study_are_what_their_names_say():
    shares = {"pairs50": 0.5, "pairs25": 0.25, "pairs13": 0.125, "2x": 0.5, "4x": 0.25, "8x": 0.125}
    study = opened(SHIPPED)
    for name, rule in study.inference.items():
        if rule is None or name == "layers2" or name.startswith(("none", "only-layer-", "also-layer-")):
            continue
        dense = len(rule.dense_layers)
        kept = (dense + (30 - dense) * rule.top_k / rule.lag_size) / 30
        # Prompts of 4,096 tokens are filled to within a few of them.
        found = kv_ratio(rule, 4080, 30) if name.startswith("pairs") else kept
        assert found == pytest.approx(shares[name.partition("-")[0]], abs=0.007), name


def test_the_shipped_recipe_is_the_row_that_it_names():
    row = opened(SHIPPED).row("chosen7-4x").trained_by()
    files = ("model/smollm2", "data/hotpotqa", "experiment/smollm2_hotpotqa")
    recipe = FitSettings().given([part for file in files for part in ("--config", f"configs/{file}.yaml")])
    assert LRSAConfig().replace(**recipe["model"]["lrsa"]).to_dict() == row["attention"]
    assert {name: recipe["trainer"].get(name) for name in row["trainer"]} == row["trainer"]
    assert (recipe["model"]["optimizer"], recipe["model"]["lr_scheduler"]) == (row["optimizer"], row["lr_scheduler"])
    without_weights = {"compile_layers", "gradient_checkpointing"}
    assert {name: value for name, value in recipe["model"]["backbone"].items() if name not in without_weights} == (
        row["backbone"]
    )
    assert row["data"]["weights"] == {"hotpotqa_all": 1.0}
    data, given = opened(SHIPPED).data_sets["hotpotqa_all"], recipe["data"]["init_args"]
    assert recipe["data"]["class_path"] == data["class_path"]
    assert given["batch_size"] == row["data"]["batch_size"]
    # The same examples, and all of them: the study's own limit is beyond the last one.
    assert given["limit"].get("train", math.inf) >= data["init_args"]["limit"]["train"]
    decided = [{name: value for name, value in each.items() if name not in ("batch_size", "limit")}
               for each in (given, data["init_args"])]  # fmt: skip
    assert decided[0] == decided[1]


@pytest.mark.parametrize("row", ["dense", "random-4x", "mixed-k", "lrsa-4x-needles", "first-dense"])
def test_a_row_is_a_config_of_a_fit(row, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main(["study", "config", str(ROOT / SHIPPED), row, "--seed", "7"])
    (tmp_path / "row.yaml").write_text(capfd.readouterr().out)
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--config", "row.yaml", "--print_config"])
    assert stop.value.code == 0
    shown = yaml.safe_load(capfd.readouterr().out)
    assert shown["seed_everything"] == 7
    first = row == "first-dense"
    assert shown["trainer"]["max_steps"] == (440 if first else 740)
    assert (shown["model"]["train_attention"] is None) == (row in ("dense", "first-dense"))
    compressor = shown["model"]["lrsa"]["compressor"]["class_path"]
    assert compressor.endswith("RandomTokens" if row == "random-4x" else "LagRelative")
    assert (shown["model"]["train_top_k"] is None) == (row != "mixed-k")
    mixtures = {"first-dense": {"hotpotqa": 1.0}, "lrsa-4x-needles": {"hotpotqa_all": 0.9, "needles": 0.1}}
    assert shown["data"]["init_args"]["weights"] == mixtures.get(row, {"hotpotqa_all": 1.0})
    assert list(shown["data"]["init_args"]["data_sets"]) == list(shown["data"]["init_args"]["weights"])
