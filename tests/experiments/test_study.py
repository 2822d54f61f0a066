"""What a study file means: rows, hashes, the order of the work, and configs for the command line."""

import json
from pathlib import Path

import pytest
import yaml
from cli_helpers import refusal
from experiments.tiny_study import STUDY, merged
from helpers import one_line, refused

from lrsa_lit.attention import LRSAConfig
from lrsa_lit.cli.main import main
from lrsa_lit.cli.study import open_study
from lrsa_lit.errors import UserError
from lrsa_lit.experiments.commands import evaluation
from lrsa_lit.experiments.study import Evaluation
from lrsa_lit.ops.sparse_attention import RandomTokens
from lrsa_lit.tasks.attentions import evaluated
from lrsa_lit.yaml_file import read_settings


def taught(by: str, **init_args) -> dict:
    """A row with another one as its teacher."""
    kl = {"class_path": "lrsa_lit.objectives.Distillation", "init_args": {"teacher": {"row": by}, **init_args}}
    return {"model": {"objective": {"class_path": "lrsa_lit.objectives.Sum", "init_args": {"objectives": [kl]}}}}


def study_of(tmp_path: Path, **changes):
    path = tmp_path / "changed.yaml"
    path.write_text(yaml.safe_dump(merged(STUDY, changes), sort_keys=False))
    return open_study(str(path))


@pytest.mark.parametrize(
    "changes",
    [
        {"trainer": {"val_check_interval": 7}},
        {"model": {"max_new_tokens": 9, "evaluate": {"k4": {"top_k": 4}}}},
        {"model": {"backbone": {"gradient_checkpointing": True}}},
        {"model": {"lrsa": {"top_k": 8, "lag_size": 32, "sink_size": 2}}},
        {"inference": {"16x": {"top_k": 2}}},
    ],
    ids=["validation", "evaluation", "memory", "order", "inference"],
)
def test_a_hash_tells_only_what_is_trained(changes, tmp_path):
    assert study_of(tmp_path, **changes).row("lrsa").hash == study_of(tmp_path).row("lrsa").hash


@pytest.mark.parametrize(
    "changes",
    [
        {"trainer": {"max_steps": 4}},
        {"model": {"optimizer": {"init_args": {"lr": 0.5}}}},
        {"model": {"lrsa": {"top_k": 9}}},
        {"data": {"init_args": {"batch_size": 3}}},
        {"data": {"init_args": {"weights": {"text": 1.0}}}},
    ],
    ids=["steps", "rate", "rule", "batch", "data"],
)
def test_a_hash_tells_all_that_is_trained(changes, tmp_path):
    assert study_of(tmp_path, **changes).row("lrsa").hash != study_of(tmp_path).row("lrsa").hash


def test_dense_training_does_not_depend_on_the_rule(tmp_path):
    other = study_of(tmp_path, model={"lrsa": {"top_k": 9}})
    assert other.row("dense").hash == study_of(tmp_path).row("dense").hash
    assert other.row("dense").rule is None


def test_a_row_needs_those_whose_checkpoints_it_names(tmp_path):
    onward = merged(taught("dense"), {"model": {"start_from": {"row": "later"}}})
    rows = {"onward": onward, "later": {"trainer": {"max_steps": 5}}, "taught": taught("dense")}
    study = study_of(tmp_path, rows=rows)
    assert list(study.rows) == [*STUDY["rows"], *rows], "in the order of the file"
    assert [row.name for row in study.row("onward").needs] == ["dense", "later"]
    assert study.row("lrsa").needs == ()
    # Another teacher, by its settings and not by its name, is another training.
    renamed = {"renamed": STUDY["rows"]["dense"], "taught": taught("renamed")}
    other = study_of(tmp_path, rows=merged(rows, {"later": {"trainer": {"max_steps": 6}}}) | renamed)
    assert other.row("onward").hash != study.row("onward").hash
    assert other.row("taught").hash == study.row("taught").hash


def test_what_a_row_needs_reads_its_data(tmp_path):
    text = {"data": {"init_args": {"weights": {"text": 1.0, "plain": 0}}}}
    rows = {"of-text": text, "middle": taught("of-text"), "onward": {"model": {"start_from": {"row": "middle"}}}}
    study = study_of(tmp_path, rows=rows)
    assert study.row("onward").train_sets == ["plain", "text"]
    assert study.row("base").train_sets == []


@pytest.mark.parametrize(
    ("rows", "named"),
    [
        ({"a": taught("none")}, "rows.a: there is no row 'none'; rows are base, "),
        ({"a": taught("a")}, "rows.a needs itself: a needs a"),
        ({"a": taught("b"), "b": {"model": {"start_from": {"row": "a"}}}}, "rows.a needs itself: a needs b needs a"),
        ({"a": taught("base")}, "rows.a: row 'base' trains nothing; name its model"),
        ({"a": taught("dense", teacher={"row": 3})}, "rows.a: model.objective"),
        ({"a": {"model": {"start_from": {"rows": "dense"}}}}, "rows.a: model.start_from"),
    ],
    ids=["unknown", "itself", "circle", "untrained", "number", "key"],
)
def test_mistakes_about_what_a_row_needs_are_named(rows, named, tmp_path):
    with pytest.raises(UserError) as error:
        study_of(tmp_path, rows=rows)
    assert named in one_line(error.value)


def test_a_row_that_needs_another_says_so_as_a_config(tmp_path, capfd, monkeypatch):
    study_of(tmp_path, rows={"taught": taught("dense", positions=9)})
    monkeypatch.chdir(tmp_path)
    main(["study", "config", "changed.yaml", "taught", "--seed", "7"])
    printed = capfd.readouterr().out
    first = printed.splitlines()[0]
    assert first.startswith("# dense.ckpt is the last checkpoint")
    assert "`lrsa study config changed.yaml dense --seed 7`" in first
    (kl,) = yaml.safe_load(printed)["model"]["objective"]["init_args"]["objectives"]
    assert kl["init_args"]["teacher"] == "dense.ckpt"
    (tmp_path / "row.yaml").write_text(printed)
    line = refusal(capfd, "fit", "--config", "row.yaml", "--trainer.logger", "false")
    assert "model.objective.teacher" in line
    assert "dense.ckpt does not exist" in line


def test_a_part_goes_through_all_rows_before_the_next_seed(tmp_path):
    work = list(study_of(tmp_path).work("all"))
    assert [(item.row.name, item.seed) for item in work] == [
        ("base", 0), ("mixed", 0), ("lrsa", 0), ("mixed", 1), ("lrsa", 1)]  # fmt: skip
    own, random = work[2].evaluations
    assert own.rule == LRSAConfig(sink_size=2, lag_size=32, top_k=8)
    assert random.rule == own.rule.replace(compressor=RandomTokens())


def test_the_same_attention_is_evaluated_once(tmp_path):
    parts = {"twice": {"rows": ["lrsa"], "inference": ["own", "4x", "dense"], "sets": ["plain", "text"]}}
    (work, _) = study_of(tmp_path, parts=parts).work("twice")
    assert [(item.name, item.data_set) for item in work.evaluations] == [
        ("own", "plain"), ("dense", "plain"), ("own", "text"), ("dense", "text")]  # fmt: skip


def test_what_several_parts_ask_for_is_put_together(tmp_path):
    common = {"sets": ["plain"], "split": "test"}
    parts = {
        "losses": {**common, "rows": ["lrsa", "base"], "seeds": [0], "inference": ["dense", "own"], "generate": False},
        "answers": {**common, "rows": ["dense", "lrsa"], "seeds": [1, 0], "inference": ["8x", "4x"]},
        "val": {**common, "rows": ["lrsa"], "seeds": [0], "inference": ["4x"], "split": "val"},
    }
    study = study_of(tmp_path, parts=parts)
    work = study.work("losses", "answers", "val")
    # Where the first part has them; the base LLM has one seed.
    assert [(item.row.name, item.seed) for item in work] == [
        ("lrsa", 0), ("base", 0), ("dense", 1), ("lrsa", 1), ("dense", 0)]  # fmt: skip
    # own and 4x are one rule: its answers have the losses too, on each split.
    assert [(item.name, item.split, item.generates) for item in work[0].evaluations] == [
        ("dense", "test", False), ("4x", "test", True), ("8x", "test", True), ("4x", "val", True)]  # fmt: skip
    other = study.work("answers", "losses")
    assert [(item.row.name, item.seed) for item in other] == [
        ("dense", 1), ("lrsa", 1), ("dense", 0), ("lrsa", 0), ("base", 0)]  # fmt: skip
    assert [(item.name, item.generates) for item in other[3].evaluations] == [
        ("8x", True), ("4x", True), ("dense", False)]  # fmt: skip
    assert study.work("losses", "losses") == study.work("losses")
    with refused("--part", "none"):
        study.work("losses", "none")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"row": {}}, "'row'"),
        ({"rows": {"lrsa": {"modle": {}}}}, "'modle'"),
        ({"rows": {"lrsa": {"model": {"train_attention": {"top_k": 99}}}}}, "rows.lrsa.model.train_attention"),
        ({"rows": {"lrsa": {"data": {"init_args": {"weights": {"other": 1}}}}}}, "'other'"),
        ({"inference": {"4x": {"top_k": -1}}}, "inference.4x"),
        ({"inference": {"4x": {"compressor": {"class_path": "lrsa_lit.Nothing"}}}}, "lrsa_lit.Nothing"),
        ({"configs": ["configs/none.yaml"]}, "configs/none.yaml"),
        ({"bars": ["none"]}, 'bars: ["none"]'),
        ({"parts": {"main": None}}, "parts.main: it must"),
        ({"parts": {"other": {"rows": ["lrsa"], "sets": ["plain"]}}}, "parts.other: inference is missing"),
        ({"parts": {"other": {"row": ["lrsa"]}}}, "parts.other"),
        ({"seeds": 3}, "seeds: 3"),
        ({"seeds": [-1]}, "seeds: [-1]"),
        ({"configs": "x.yaml"}, 'configs: "x.yaml"'),
        ({"rows": ["lrsa"]}, 'rows: ["lrsa"]'),
        ({"rows": {"lrsa": {"trainer": None}}}, "rows.lrsa.trainer: null"),
        ({"rows": {"lrsa": {"trainer": {"max_step": 9}}}}, "rows.lrsa: trainer.max_step:"),
        ({"rows": {"lrsa": {"trainer": {"max_steps": "many"}}}}, "rows.lrsa: trainer.max_steps: many"),
        ({"rows": {"lrsa": {"model": {"lsra": {"top_k": 2}}}}}, "rows.lrsa: model.lsra"),
        ({"rows": {"lrsa": {"model": {"lrsa": None}}}}, "rows.lrsa: model.lrsa"),
        ({"rows": {"lrsa": {"model": {"max_new_tokens": 1.5}}}}, "rows.lrsa: model.max_new_tokens: 1.5"),
        ({"rows": {"lrsa": {"model": {"backbone": {"source": None}}}}}, "model.backbone.source"),
        ({"rows": {"lrsa": {"model": {"train_attention": "dense"}}}}, "rows.lrsa: model.train_attention"),
        ({"rows": {"lrsa": {"data": {"init_args": {"batchsize": 4}}}}}, "rows.lrsa: data.init_args.batchsize"),
        ({"rows": {"lrsa": {"data": {"init_args": {"weights": {"plain": 0}}}}}}, "nothing is left to train on"),
        ({"trainer": {"stepss": 4}}, "trainer.stepss"),
        ({"model": None}, "model: null"),
        ({"inference": {"4x": "dense"}}, "inference.4x"),
        ({"data_sets": {"plain": {"measure": "f2"}}}, 'data_sets.plain.measure: "f2"'),
        ({"data_sets": {"plain": None}}, "data_sets.plain: it must"),
        ({"data_sets": {"other": {"generate": False}}}, "data_sets.other: class_path is missing"),
        ({"parts": {"main": {"rows": "lrsa"}}}, 'parts.main.rows: "lrsa"'),
        ({"parts": {"main": {"split": "tst"}}}, 'parts.main.split: "tst"'),
        ({"parts": {"main": {"generate": "no"}}}, 'parts.main.generate: "no"'),
        ({"parts": {"main": {"against": {"row": "lrsa"}}}}, "parts.main.against: inference is missing"),
        ({"parts": {"main": {"sets": ["palin"]}}}, "parts.main.sets: there is no data set 'palin'"),
    ],
)
def test_mistakes_are_named(changes, named, tmp_path):
    with pytest.raises(UserError) as error:
        study_of(tmp_path, **changes)
    assert named in one_line(error.value)


@pytest.mark.parametrize(
    ("text", "named"),
    [("", "nothing"), ("- a", "a list"), ("rows: {a: null}\nparts: {}\nrows: {b: null}", "line 3: the key 'rows'"),
     ("a: &a {x: 1}\nb: {<<: *a, x: 2}", "setting 'a'")],
    ids=["empty", "list", "key twice", "merged key"],
)  # fmt: skip
def test_a_file_that_holds_no_study_is_named(text, named, tmp_path):
    (tmp_path / "s.yaml").write_text(text)
    with pytest.raises(UserError, match=r"s\.yaml") as error:
        open_study(str(tmp_path / "s.yaml"))
    assert named in one_line(error.value)


def test_a_folder_is_no_study(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with refused("study", "."):
        open_study(".")


@pytest.mark.parametrize(("key", "value"), [("rows", ["none"]), ("inference", ["none"]), ("sets", ["none"]),
                                             ("against", {"row": "none", "inference": "own"}),
                                             ("against", {"row": "lrsa", "inference": "none"})])  # fmt: skip
def test_mistakes_of_a_part_are_named(key, value, tmp_path):
    with pytest.raises(UserError, match="'none'"):
        study_of(tmp_path, parts={"main": {key: value}})


def test_an_attention_that_a_part_is_held_against_is_named_where_it_stands(tmp_path):
    with refused("parts.main.against.inference", reason="'none'"):
        study_of(tmp_path, parts={"main": {"against": {"row": "lrsa", "inference": "none"}}})


@pytest.mark.parametrize("written", ["2e-4", "0.2E-3", "+2e-04", "2.0e-4"])
def test_a_number_is_one_however_it_is_written(written, tmp_path):
    """YAML 1.1 takes some of them for names, the command line none."""
    path = tmp_path / "s.yaml"
    path.write_text(yaml.safe_dump({**STUDY, "configs": []}) + f"x: {written}\n")
    assert read_settings(path)["x"] == 2e-4
    path.write_text("x: [2e, e4, 1e4x, v1e4, 2024-11-22]")
    assert all(not isinstance(name, float) for name in read_settings(path)["x"])


def test_an_attention_has_no_settings_that_its_system_does_not_read(tmp_path):
    named = refused(f"{tmp_path / 'changed.yaml'}: inference.x.top_k", 4, reason="not read by the system KeyNorm")
    with named:
        study_of(tmp_path, inference={"x": {"system": "KeyNorm", "top_k": 4}})
    with refused(str(tmp_path / "changed.yaml"), reason="model.lrsa.sink_size: 2 is not read by the system KeyNorm"):
        study_of(tmp_path, model={"lrsa": {"system": "KeyNorm"}})


def test_another_k_is_one_for_all_heads(tmp_path):
    study = study_of(tmp_path, model={"lrsa": {"head_top_k": [[8, 2], 4]}})
    assert study.inference["8x"].head_top_k is None
    assert study.inference["random-4x"].head_top_k == ((8, 2), 4)


def test_an_evaluation_sets_all_of_its_first_attention(tmp_path):
    """Whatever the study's own has: a system or budgets would stay in the place of a rule."""
    study = study_of(tmp_path, model={"lrsa": {"head_top_k": [2, 4]}})
    row = study.row("base")
    items = [Evaluation(name, study.inference[name], "plain", "test", True) for name in ("8x", "4x")]
    evaluation(study, row, items, tmp_path / "out", {}, depth=2)
    layers = [yaml.safe_load(path.read_text()) for path in tmp_path.rglob("settings-*.yaml")]
    (model,) = [layer["model"] for layer in layers if "evaluate" in layer.get("model", {})]
    assert model["lrsa"] == {"system": None, "head_top_k": None, "latents": False, **study.inference["8x"].to_dict()}
    assert model["evaluate"]["4x"]["head_top_k"] == [2, 4]


def test_an_attention_for_each_layer(tmp_path):
    inference = {"only": {"dense_layers": {"only": 3}}, "but": {"top_k": 4, "dense_layers": {"all_but": 3}},
                 "also": {"dense_layers": {"only": 3, "beside": [1]}}}  # fmt: skip
    parts = {"layers": {"rows": ["base"], "inference": ["but-*", "only-1", "also-*"], "sets": ["plain"]}}
    study = study_of(tmp_path, inference=inference, parts=parts)
    (work,) = study.work("layers")
    assert [(item.name, item.rule.dense_layers, item.rule.top_k) for item in work.evaluations] == [
        ("but-0", (1, 2), 4), ("but-1", (0, 2), 4), ("but-2", (0, 1), 4), ("only-1", (1,), 8),
        ("also-0", (0, 1), 8), ("also-2", (1, 2), 8)]  # fmt: skip
    with pytest.raises(UserError, match="other-"):
        list(study_of(tmp_path, parts={"main": {"inference": ["other-*"]}}).work("main"))


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"first": 3}, "{'first': 3} is not allowed"),
        ({}, "{} is not allowed"),
        ({"beside": [1]}, "{'beside': [1]} is not allowed"),
        ({"all_but": 3, "only": 3}, "{'all_but': 3, 'only': 3} is not allowed"),
        ({"all_but": 3, "beside": [1]}, "'beside': [1]} is not allowed"),
        ({"only": "3"}, "only: '3' is not allowed"),
        ({"only": True}, "only: True is not allowed"),
        ({"only": 0}, "only: 0 is not allowed"),
        ({"all_but": -1}, "all_but: -1 is not allowed"),
        ({"only": 3, "beside": 1}, "beside: 1 is not allowed"),
        ({"only": 3, "beside": [3]}, "beside: [3] is not allowed; it must be a list of different layers from 0 to 2"),
        ({"only": 3, "beside": [-1]}, "beside: [-1] is not allowed"),
        ({"only": 3, "beside": ["1"]}, "beside: ['1'] is not allowed"),
        ({"only": 3, "beside": [True]}, "beside: [True] is not allowed"),
        ({"only": 3, "beside": [1, 1]}, "beside: [1, 1] is not allowed"),
        ({"only": 3, "beside": [0, 1, 2]}, "beside: [0, 1, 2] is not allowed"),
    ],
    ids=str,
)
def test_mistakes_of_an_attention_for_each_layer_are_named(wrong, named, tmp_path):
    path = tmp_path / "wrong.yaml"
    path.write_text(yaml.safe_dump({**STUDY, "inference": {"one": {"dense_layers": wrong}}}))
    with pytest.raises(UserError) as error:
        open_study(str(path))
    assert one_line(error.value).startswith("inference.one.dense_layers")
    assert named in str(error.value)


def test_an_attention_takes_nothing_from_the_one_that_a_command_evaluates_first(tmp_path):
    """Not even what a rule's settings leave out where it is not set, such as latents."""
    few = {"rows": ["base"], "seeds": [0], "inference": ["narrow", "4x"], "sets": ["plain"]}
    study = study_of(tmp_path, inference={"narrow": {"latents": True}}, parts={"few": few})
    (work,) = study.work("few")
    evaluation(study, work.row, work.evaluations, tmp_path / "work", {}, depth=2)
    written = [json.loads(path.read_text()) for path in tmp_path.glob("work/*/settings-*.yaml")]
    (model,) = (layer["model"] for layer in written if "evaluate" in layer.get("model", {}))
    own = LRSAConfig.from_dict(model["lrsa"])
    assert own == study.rule("", {"latents": True})
    assert evaluated(own, model["evaluate"])["4x"] == study.rule("", {})
