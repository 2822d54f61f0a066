"""Tables out of a store: runs, rules, and the answers to questions."""

import json
import math
from pathlib import Path

import pandas as pd
import pytest
from helpers import refused

from lrsa_lit.analysis import plots, runs
from lrsa_lit.tracking.store import find_experiment


def add_run(store, experiment, name, *, top_k=8, seed=0, train="{}", answers=None, rule=(), **metrics):
    run = store.create_run(experiment, run_name=name, tags={"seed": str(seed)})
    params = {"lrsa.lag_size": 32, "lrsa.top_k": top_k, "train_attention": train}
    params |= {f"lrsa.{key}": value for key, value in dict(rule).items()}
    params["backbone.source"] = "package://d/SmolLM2-135M-Instruct.Q4_1.gguf"
    for key, value in params.items():
        store.log_param(run.info.run_id, f"model.{key}", value)
    for key, value in metrics.items():
        store.log_metric(run.info.run_id, key.replace("_", "/", 1), value)
    if answers is not None:
        # As at each validation: the scores of the first one must not count.
        for step, scores in ((0, dict.fromkeys(answers, 0.25)), (4, answers)):
            rows = [
                {"step": step, "id": key, "question": f"{key}?", "gold": key}
                | {"LRSA": f"{name} {key}", "LRSA F1": f1, "dense": "d", "dense F1": 0.125}
                for key, f1 in scores.items()
            ]
            columns = {column: [row[column] for row in rows] for column in rows[0]}
            store.log_table(run.info.run_id, columns, runs.QUESTIONS)
    return run.info.run_id


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """A store of five runs in ``sweep``, one of them never validated, one without answers; ``idle`` has none."""
    from mlflow.tracking import MlflowClient

    folder = tmp_path_factory.mktemp("store") / "runs"
    folder.mkdir()
    store = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    experiment, _ = (store.create_experiment(name, (folder / "artifacts").as_uri()) for name in ("sweep", "idle"))
    ids = {
        "k8-s0": add_run(store, experiment, "k8-s0", answers={"1": 1.0, "2": 0.0, "3": 0.5}, val_f1=0.5, val_em=0.25),
        "k8-s1": add_run(store, experiment, "k8-s1", seed=1, answers={"1": 0.5, "2": 0.5}, val_f1=0.5),
        "k16": add_run(
            store, experiment, "k16", top_k=16, answers={"2": 1.0, "1": 1.0}, val_f1=1.0, perf_step_seconds=2.0
        ),
        "dense": add_run(store, experiment, "dense", train="None", val_f1=0.3),
        "died": add_run(store, experiment, "died", train_loss=3.0),
    }
    return store, ids, folder


def test_store_is_found_from_a_folder_below_and_by_the_environment(recorded, monkeypatch, tmp_path, capsys):
    _, ids, folder = recorded
    (folder.parent / "notebooks").mkdir(exist_ok=True)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(folder.parent / "notebooks")
    assert runs.find_run(runs.open_store(), "sweep", "k16").info.run_id == ids["k16"]
    assert capsys.readouterr().err == f"Runs of {folder / 'mlflow.db'}\n"
    monkeypatch.chdir(folder.parent)
    runs.open_store()
    assert capsys.readouterr().err == f"Runs of {folder / 'mlflow.db'}\n"
    monkeypatch.chdir(tmp_path)
    # A name that no folder above has, whatever stands there.
    monkeypatch.setattr(runs, "DEFAULT", Path(f"runs/{tmp_path.name}.db"))
    with refused("tracking_uri"):
        runs.open_store()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/mlflow.db")
    assert find_experiment(runs.open_store(), "idle", "experiment").name == "idle"
    with refused("tracking_uri", reason="does not exist"):
        runs.open_store(f"sqlite:///{tmp_path}/none.db")
    assert not (tmp_path / "none.db").exists()


def test_latest_experiment_is_that_of_the_latest_run_with_what_is_asked_for(tmp_path, capsys):
    from mlflow.tracking import MlflowClient

    store = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    names = ("kept", "validated", "died")
    ids = {name: store.create_experiment(name, (tmp_path / name).as_uri()) for name in names}
    for ask in ({}, {"with_selections": True}):
        with refused("experiment", reason="no run of this store"):
            runs.latest_experiment(store, **ask)
    kept = add_run(store, ids["kept"], "a", val_f1=0.5)
    store.log_text(kept, "", f"{runs.SELECTIONS}/step000000.npz")
    add_run(store, ids["validated"], "b", val_f1=0.0)
    add_run(store, ids["died"], "c", train_loss=3.0)
    assert runs.latest_experiment(store) == "validated"
    said = capsys.readouterr().err
    assert said.startswith("Experiment validated, the latest; others: ")
    assert all(name in said for name in ("kept", "died"))
    assert runs.latest_experiment(store, with_selections=True) == "kept"


def test_runs_are_found_by_name_and_id(recorded):
    store, ids, _ = recorded
    for name in ("k16", ids["k16"]):
        assert runs.find_run(store, "sweep", name).info.run_id == ids["k16"]


@pytest.mark.parametrize(
    ("ask", "field", "told"),
    [
        (lambda store: runs.find_run(store, "sweeep", "a"), "experiment", "sweep"),
        (lambda store: runs.find_run(store, "sweep", "k8-s2"), "run", "'k8-s1'"),
        (lambda store: runs.table(store, "idle"), "experiment", "'idle'"),
        (lambda store: runs.latest_with_selections(store, "sweep"), "experiment", "selections"),
        (lambda store: runs.selections(store, runs.find_run(store, "sweep", "k16")), "run", "selections"),
        (
            lambda store: runs.questions(store, [runs.find_run(store, "sweep", "dense").info.run_id]),
            "run",
            "no artifact",
        ),
    ],
    ids=["experiment", "run", "empty", "no-selections", "none-of-this-run", "no-answers"],
)
def test_what_is_not_there_is_told(recorded, ask, field, told):
    with refused(field) as caught:
        ask(recorded[0])
    assert told in str(caught.value)


def test_experiment_whose_runs_were_never_validated(recorded):
    store, _, folder = recorded
    add_run(store, store.create_experiment("early", (folder / "artifacts").as_uri()), "a", train_loss=1.0)
    with refused("experiment", reason="val/f1"):
        runs.table(store, "early")


def test_table_has_a_row_for_each_validated_run(recorded):
    store, ids, _ = recorded
    table = runs.table(store, "sweep")
    assert set(table.index) == set(ids.values()) - {ids["died"]}
    row = table.loc[ids["k8-s0"]]
    assert (row["name"], row["model"], row["lag_size"], row["top_k"], row["kept_share"]) == (
        "k8-s0", "SmolLM2-135M-Instruct", 32, 8, 0.25)  # fmt: skip
    assert (row["seed"], row["f1"], row["em"]) == ("0", 0.5, 0.25)
    assert math.isnan(row["step_seconds"])
    assert table.loc[ids["k16"], "step_seconds"] == 2.0
    assert table.loc[ids["dense"], "model"] == "SmolLM2-135M-Instruct-dense"


def test_answers_become_scores_of_the_shared_questions(recorded):
    store, ids, _ = recorded
    answers = runs.questions(store, [ids[name] for name in ("k8-s0", "k8-s1", "k16")])
    scores = runs.shared_scores(answers)
    assert list(scores.columns) == ["1", "2"], "question 3 was asked of one run only"
    assert scores.loc[ids["k16"]].tolist() == [1.0, 1.0]
    assert scores.loc[ids["k8-s0"]].tolist() == [1.0, 0.0]

    rules = runs.by_rule(runs.table(store, "sweep"), scores).set_index("top_k")
    assert rules["runs"].to_dict() == {8: 2, 16: 1}
    assert rules["f1"].to_dict() == {8: 0.5, 16: 1.0}
    assert rules.loc[8, "f1_low"] < 0.5 < rules.loc[8, "f1_high"]
    (row,) = runs.differences(runs.table(store, "sweep"), scores).to_dict("records")
    assert (row["first"], row["second"]) == ("SmolLM2-135M-Instruct L32 K8", "SmolLM2-135M-Instruct L32 K16")
    assert row["mean"] == -0.5
    assert row["low"] <= -0.5 <= row["high"]

    found = runs.answered_by_one(answers, ids["k8-s0"], ids["k16"])
    assert list(found.index) == ["2"]
    assert found.loc["2", ["prediction_first", "prediction_second", "gold"]].tolist() == ["k8-s0 2", "k16 2", "2"]
    assert set(runs.questions(store, [ids["k16"]], attention="dense")["f1"]) == {0.125}
    with refused("run", reason="'k4'"):
        runs.questions(store, [ids["k16"]], attention="k4")
    assert runs.answered_by_one(answers, ids["k16"], ids["k16"]).empty


def test_runs_of_systems_and_of_budgets_are_no_runs_of_the_rule(recorded):
    store, _, folder = recorded
    experiment = store.create_experiment("systems", (folder / "artifacts").as_uri())
    systems = (
        {"system": "lrsa_lit.systems.KeyNorm", "system.kept": kept, "system.pairs": None} for kept in (0.5, 0.25)
    )
    of = [{}, {}, {"head_top_k": "heads.json"}, *systems]
    ids = [
        add_run(store, experiment, f"r{n}", answers={"1": n / 4}, val_f1=n / 4, rule=rule) for n, rule in enumerate(of)
    ]
    table, scores = runs.table(store, "systems"), runs.shared_scores(runs.questions(store, ids))
    assert table.loc[ids[3], ["lag_size", "top_k", "kept_share"]].isna().all()
    rules = runs.by_rule(table, scores)
    name = "SmolLM2-135M-Instruct"
    names = [f"{name}", f"{name} KeyNorm kept=0.25", f"{name} KeyNorm kept=0.5", f"{name} head_top_k=heads.json"]
    assert rules["model"].tolist() == names
    assert rules["runs"].tolist() == [2, 1, 1, 1]
    titles = set(runs.differences(table, scores)[["first", "second"]].to_numpy().flat)
    assert titles == {f"{name} L32 K8", names[1], names[2], f"{names[3]} L32"}
    (axes,) = plots.f1_against(rules, "f1", "F1").axes
    assert {text.get_text() for text in axes.get_legend().get_texts()} == {
        f"{name} L32",
        *names[1:3],
        f"{names[3]} L32",
    }
    assert axes.texts[0].get_text() == "K8"


def test_all_answers_come_before_the_table(recorded):
    store, ids, folder = recorded
    experiment = store.create_experiment("all", (folder / "artifacts").as_uri())
    run = add_run(store, experiment, "a", answers={"1": 0.0}, val_f1=0.5)
    rows = [
        {"step": 4, "id": str(n), "question": "q", "gold": "1911"}
        | {"LRSA": {"prediction": "1911", "f1": n / 10, "em": 0.0}, "dense": {"prediction": "d", "f1": 1.0, "em": 1.0}}
        for n in range(10)
    ]
    store.log_text(run, "".join(json.dumps(row) + "\n" for row in rows), runs.ANSWERS)
    answers = runs.questions(store, [run, ids["k16"]])
    assert answers.loc[run, "f1"].tolist() == [n / 10 for n in range(10)]
    assert set(answers.loc[run, "prediction"]) == {"1911"}
    assert list(runs.shared_scores(answers).columns) == ["1", "2"]
    assert runs.questions(store, [run], attention="dense")["f1"].mean() == 1.0
    with refused("run", reason="'k4'"):
        runs.questions(store, [run], attention="k4")


def test_runs_of_different_data_share_nothing():
    answers = pd.concat({run: pd.DataFrame({"f1": [1.0]}, index=[run]) for run in "ab"}, names=["run", "id"])
    with refused("runs"):
        runs.shared_scores(answers)


@pytest.mark.parametrize("key", ["head_top_k", "head_top_k.budget"])
def test_a_run_whose_heads_differ_has_no_single_k(key, recorded):
    store, _, folder = recorded
    experiment = store.create_experiment(key, (folder / "artifacts").as_uri())
    store.log_param(add_run(store, experiment, "ranked", val_f1=0.5), f"model.lrsa.{key}", "0.25")
    (row,) = runs.table(store, key).to_dict("records")
    assert row["model"].endswith(f" head_top_k={'budget=' if '.' in key else ''}0.25")
    assert math.isnan(row["top_k"])
    assert math.isnan(row["kept_share"])
