"""``lrsa sweep``: what it refuses, what it runs, and what it does not run again."""

import csv
import json
import os
import signal
import subprocess
import sys
import threading
from multiprocessing.connection import Client, Listener

import pytest
import warm
from cli_helpers import DEBUG, before_step, ctrl_c, elsewhere, interruptible, recorded_runs, refusal
from helpers import refused
from mlflow.tracking import MlflowClient

import lrsa_lit
from lrsa_lit.cli.fit_settings import FitSettings
from lrsa_lit.cli.main import main
from lrsa_lit.experiments import jobs, sweep
from lrsa_lit.experiments.sweep import parse, points
from lrsa_lit.tracking import heartbeat

__all__ = ["elsewhere"]

SHORT = ["--trainer.max_steps", "1", "--validate_first", "false"]
TWO = ["sweep", *DEBUG, "--grid", "model.lrsa.top_k=4,8"]


class Fits:
    """Stand-ins for fits: processes that end as they are told for their value of K.

    What they would record is recorded here for them, as it takes seconds to import MLflow.
    """

    CODE = """
import os, signal, sys, time
from multiprocessing.connection import Client
address, top_k, end = sys.argv[1:]
def record(status):
    with Client(address) as recorder:
        recorder.send((top_k, status, os.environ["MLFLOW_RUN_CONTEXT"]))
        recorder.recv()
try:
    record("RUNNING")
    if end == "hang":
        time.sleep(600)
except KeyboardInterrupt:
    record("KILLED")
    print("saved", flush=True)
    sys.exit(130)
if end == "dies":
    os.kill(os.getpid(), signal.SIGKILL)
record("FAILED" if end == "fails" else "FINISHED")
sys.exit(end == "fails")
"""

    def __init__(self, store, listener):
        self.store, self.listener = store, listener
        self.ends = {}
        self.ran = []
        self.when_begun = lambda top_k: None

    def command(self, arguments):
        top_k = arguments[arguments.index("--model.lrsa.top_k") + 1]
        self.ran.append(top_k)
        return [sys.executable, "-c", self.CODE, self.listener.address, top_k, self.ends.get(top_k, "well")]

    def record(self):
        """Do as the processes ask until one of them asks for nothing."""
        runs = {}
        while True:
            with self.listener.accept() as fit:
                if not (asked := fit.recv()):
                    return
                top_k, status, tags = asked
                client = MlflowClient(self.store)
                if status == "RUNNING":
                    experiment = client.get_experiment_by_name("debug").experiment_id
                    run = client.create_run(experiment, tags=json.loads(tags), run_name=f"K{top_k}")
                    runs[top_k] = run.info.run_id
                    client.log_metric(runs[top_k], "val/f1", int(top_k) / 100)
                else:
                    client.set_terminated(runs[top_k], status)
                fit.send("recorded")
                if status == "RUNNING":
                    self.when_begun(top_k)


@pytest.fixture
def fits(elsewhere, monkeypatch):
    with Listener(family="AF_UNIX") as listener:
        fits = Fits(f"sqlite:///{elsewhere}/runs/mlflow.db", listener)
        monkeypatch.setattr(jobs, "command_line", fits.command)
        recorder = threading.Thread(target=fits.record)
        recorder.start()
        yield fits
        with Client(listener.address) as last:
            last.send(None)
        recorder.join()


@pytest.fixture
def quickly(monkeypatch):
    """Real fits, in processes that start at once."""
    with warm.commands() as command:
        monkeypatch.setattr(jobs, "command_line", command)
        yield


@pytest.fixture
def runs(elsewhere):
    """The runs by name; of several of one name the latest."""

    def read():
        found = recorded_runs(elsewhere / "runs/mlflow.db", "debug")
        return {run.info.run_name: run for run in reversed(found)}

    return read


def rows(shown):
    return [[cell.strip() for cell in line.strip("│").split("│")] for line in shown.splitlines() if line[:1] == "│"]


def test_the_command_line_of_a_fit_is_that_of_this_installation():
    said = subprocess.run(jobs.command_line(["--version"]), capture_output=True, text=True, check=True).stdout
    assert said == f"lrsa-lit {lrsa_lit.__version__}\n"


@pytest.mark.slow
def test_real_fits_one_of_which_fails(quickly, runs, monkeypatch, capfd):
    # No question fits into 20 tokens, which the config alone does not show.
    asked = ["sweep", *DEBUG, *SHORT, "--grid", "data.init_args.max_tokens=20,4096"]
    with pytest.raises(SystemExit) as stop:
        main(asked)
    assert stop.value.code == 1
    failed, finished = rows(capfd.readouterr().out)[-2:]
    assert failed[0] == "20"
    assert failed[-2:] == ["failed (exit code 2)", "-"]
    assert finished[0] == "4096"
    assert finished[-2:] == ["finished", "tiny-L32-K8-s0"]
    child, parent = runs()["tiny-L32-K8-s0"], runs()["sweep-max_tokens"]
    assert child.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert child.data.params["data.max_tokens"] == "4096"
    assert finished[1] == child.data.params["kv_ratio"]
    assert finished[3] == f"{child.data.metrics['val/f1']:.3f}"
    assert (child.info.status, parent.info.status) == ("FINISHED", "FAILED")
    assert json.loads(parent.data.tags["sweep.grid"]) == {"data.init_args.max_tokens": ["20", "4096"]}

    begun = []

    def fails_again(arguments):
        begun.append(arguments[-1])
        return ["sh", "-c", "exit 2"]

    monkeypatch.setattr(jobs, "command_line", fails_again)
    with pytest.raises(SystemExit) as stop:
        main(asked)
    assert stop.value.code == 1
    failed, finished = rows(capfd.readouterr().out)[-2:]
    assert failed[-2] == "failed (exit code 2)"
    assert finished[-2] == "finished before"
    assert begun == ["20"]
    assert set(runs()) == {"tiny-L32-K8-s0", "sweep-max_tokens"}
    assert runs()["sweep-max_tokens"].info.run_id == parent.info.run_id


def test_all_combinations_and_never_twice(fits, runs, capfd):
    asked = [*TWO, "--grid", "model.lrsa.lag_size=16,32"]
    main(asked)
    assert fits.ran == ["4", "4", "8", "8"]
    table = rows(capfd.readouterr().out)[-4:]
    assert [row[:2] for row in table] == [["4", "16"], ["4", "32"], ["8", "16"], ["8", "32"]]
    assert {row[-2] for row in table} == {"finished"}
    assert runs()["sweep-top_k-lag_size"].info.status == "FINISHED"
    main(asked)
    assert len(fits.ran) == 4
    assert {row[-2] for row in rows(capfd.readouterr().out)[-4:]} == {"finished before"}
    # A larger grid runs what is new, another setting beside it everything.
    main([*TWO[:-1], "model.lrsa.top_k=4,8,12", "--grid", "model.lrsa.lag_size=16,32"])
    assert fits.ran[4:] == ["12", "12"]
    main([*TWO, "--seed_everything", "1"])
    assert fits.ran[6:] == ["4", "8"]


def test_its_own_run_has_the_table_its_picture_and_the_best_child(fits, runs, elsewhere):
    fits.ends["12"] = "fails"
    with pytest.raises(SystemExit):
        main([*TWO[:-1], "model.lrsa.top_k=4,8,12"])
    found = runs()
    parent, child = found["sweep-top_k"], found["K8"]
    # The one that failed has a higher F1, of a validation that was not its last.
    assert (parent.data.tags["sweep.best"], parent.data.tags["sweep.best_run"]) == ("K8", child.info.run_id)
    note = parent.data.tags["mlflow.note.content"].splitlines()
    page = f"#/experiments/{child.info.experiment_id}/runs/{child.info.run_id}"
    assert note[0] == f"Best: [K8]({page}) (model.lrsa.top\\_k=8), val/f1 0.080"
    assert note[2] == "| top\\_k | kv\\_ratio | val/loss | val/f1 | val/em | state | run |"
    artifacts = elsewhere / "runs/artifacts" / parent.info.run_id / "artifacts"
    table = list(csv.DictReader((artifacts / "sweep.csv").open()))
    assert [(row["top_k"], row["val/f1"]) for row in table] == [("4", "0.040"), ("8", "0.080"), ("12", "0.120")]
    assert (artifacts / "pictures/f1-against-kept.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(("end", "said"), [("fails", "failed (exit code 1)"), ("dies", "failed (exit code -9)")])
def test_one_that_fails_leaves_the_others_alone(end, said, fits, runs, capfd):
    fits.ends["4"] = end
    with pytest.raises(SystemExit) as stop:
        main(TWO)
    assert stop.value.code == 1
    assert fits.ran == ["4", "8"]
    assert [row[-2] for row in rows(capfd.readouterr().out)[-2:]] == [said, "finished"]
    assert runs()["K4"].info.status == runs()["sweep-top_k"].info.status == "FAILED"
    assert ("unexpectedly" in runs()["K4"].data.tags.get(heartbeat.DIED, "")) == (end == "dies")

    fits.ends.clear()
    main(TWO)
    assert fits.ran[2:] == ["4"]
    assert runs()["K4"].info.status == runs()["sweep-top_k"].info.status == "FINISHED"
    assert heartbeat.DIED not in runs()["sweep-top_k"].data.tags


def test_a_point_is_another_one_where_the_budgets_in_a_file_are(elsewhere):
    def digest(budgets):
        (elsewhere / "heads.json").write_text(budgets)
        (point,) = points(parse(["model.lrsa.head_top_k=heads.json"]), DEBUG, FitSettings())
        return point.digest

    assert digest("[8, 4]") == digest("[8, 4]") != digest("[8, 2]")


@pytest.mark.slow
def test_a_stopped_fit_goes_on_from_its_checkpoint_in_its_run(quickly, elsewhere, runs, monkeypatch, capfd):
    (point,) = points(parse(["model.lrsa.top_k=4"]), DEBUG, FitSettings())
    monkeypatch.setenv("MLFLOW_RUN_CONTEXT", json.dumps({sweep.POINT: point.digest}))
    with before_step(2, ctrl_c), pytest.raises(SystemExit):
        main(["fit", *point.arguments])
    monkeypatch.delenv("MLFLOW_RUN_CONTEXT")
    stopped = runs()["tiny-L32-K4-s0"]
    assert stopped.info.status == "KILLED"
    # Of a run that died while it wrote.
    next((elsewhere / "runs").rglob("last.ckpt")).with_name("last-v1.ckpt").write_bytes(b"PK")

    main(["sweep", *DEBUG, "--grid", "model.lrsa.top_k=4"])
    assert "model.lrsa.top_k=4: resumes from runs/" in capfd.readouterr().out
    found = runs()
    assert set(found) == {"tiny-L32-K4-s0", "sweep-top_k"}
    child = found["tiny-L32-K4-s0"]
    assert (child.info.run_id, child.info.status) == (stopped.info.run_id, "FINISHED")
    assert child.data.tags["mlflow.parentRunId"] == found["sweep-top_k"].info.run_id
    client = MlflowClient(f"sqlite:///{elsewhere}/runs/mlflow.db")
    history = client.get_metric_history(child.info.run_id, "train/loss")
    assert [metric.step for metric in history] == [0, 1, 2, 3]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
def test_ctrl_c_stops_the_fit_in_order_and_keeps_what_is_done(number, fits, runs, capfd):
    fits.ends["8"] = "hang"
    fits.when_begun = lambda top_k: top_k == "8" and os.kill(os.getpid(), number)
    with interruptible(), pytest.raises(SystemExit) as stop:
        main([*TWO[:-1], "model.lrsa.top_k=4,8,12"])
    assert stop.value.code == 130
    shown = capfd.readouterr()
    assert "saved" in shown.out
    assert [row[-2] for row in rows(shown.out)[-2:]] == ["finished", "stopped"]
    assert "1 of 3 points finished" in shown.out
    assert "run the same command to continue" in shown.err
    assert "Traceback" not in shown.err
    assert fits.ran == ["4", "8"]
    status = {name: run.info.status for name, run in runs().items()}
    assert status == {"sweep-top_k": "KILLED", "K4": "FINISHED", "K8": "KILLED"}


def bad_inputs():
    yield "no grid", [], ["--grid: is empty"]
    yield "unknown key", ["--grid", "model.lrsa.topk=1,2"], ["model.lrsa.topk", "model.lrsa.top_k"]
    yield "no values", ["--grid", "model.lrsa.top_k="], ["--grid", "'model.lrsa.top_k='", "KEY=VALUE"]
    yield "no key", ["--grid", "=1"], ["--grid", "'=1'"]
    yield "empty value", ["--grid", "model.lrsa.top_k=1,,2"], ["'model.lrsa.top_k=1,,2'", "without empty values"]
    yield "empty last value", ["--grid", "model.lrsa.top_k=1,"], ["'model.lrsa.top_k=1,'", "without empty values"]
    yield "value twice", ["--grid", "model.lrsa.top_k=1,2,1"], ["model.lrsa.top_k", "value 1 twice"]
    yield (
        "key twice",
        ["--grid", "model.lrsa.top_k=1", "--grid", "model.lrsa.top_k=2"],
        ["'model.lrsa.top_k' appears twice"],
    )
    yield "value of another type", ["--grid", "model.lrsa.top_k=4,abc"], ["model.lrsa.top_k", "abc", "int"]
    yield (
        "value out of bounds at one point",
        ["--grid", "model.lrsa.top_k=4,20", "--grid", "model.lrsa.lag_size=16,32"],
        ["model.lrsa.top_k: 20", "0 to lag_size (16)"],
    )
    yield "store", ["--grid", "trainer.logger.init_args.tracking_uri=a,b"], ["trainer.logger", "one store"]
    yield "no logger", ["--grid", "model.lrsa.top_k=4", "--trainer.logger", "false"], ["trainer.logger: false"]
    yield "checkpoint in the grid", ["--grid", "ckpt_path=a.ckpt,b.ckpt"], ["--ckpt_path"]
    yield "estimate", ["--grid", "model.lrsa.top_k=4", "--estimate"], ["--estimate", "lrsa fit"]
    yield "config", ["--grid", "model.lrsa.top_k=4", "--print_config"], ["--print_config", "lrsa fit"]
    yield "checkpoint", ["--grid", "model.lrsa.top_k=4", "--ckpt_path", "x.ckpt"], ["--ckpt_path"]
    yield "missing config", ["--grid", "model.lrsa.top_k=4", "--config", "nowhere.yaml"], ["nowhere.yaml"]


@pytest.mark.parametrize(("arguments", "named"), [pytest.param(*case[1:], id=case[0]) for case in bad_inputs()])
def test_bad_input_is_one_line_before_anything_runs(arguments, named, fits, elsewhere, capfd):
    line = refusal(capfd, "sweep", *DEBUG, *arguments)
    for part in named:
        assert part in line
    assert not fits.ran
    assert not (elsewhere / "runs/mlflow.db").exists()


def test_values_are_yaml():
    assert parse(["a.b=1e-4,null,true,[1,2],{x: y}"]) == {"a.b": ["1e-4", "null", "true", "[1, 2]", '{"x": "y"}']}
    with refused("--grid"):
        parse([])
