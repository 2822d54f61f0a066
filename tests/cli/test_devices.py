"""Runs on several devices, which are processes on the CPU here."""

import json
import os
import subprocess
import sys

import processes
import pytest
import torch
from cli_helpers import DEBUG, NO_LOGGER, WHOLE, refusal

from lrsa_lit.cli.main import main
from lrsa_lit.models.checkpoint import load_trained

# Two questions, one for each device: every answer token weighs the same, however they are spread over devices.
RECORDS = [
    {"id": name, "passages": [{"title": name, "text": f"The {name} is {km} km long."}], "question": f"{name}?",
     "answers": [f"{km} km"]}
    for name, km in (("Isk", 212), ("Umbra", 13770))
]  # fmt: skip
FIT = ["fit", *DEBUG, *NO_LOGGER, "--validate_first", "false", "--data.init_args.val", "null"]
STEPS = ["--model.lr_scheduler", "null", "--model.optimizer.init_args.lr", "0.001"]
DATA = ["--data.init_args.train", "two.jsonl", "--trainer.accelerator", "cpu"]
LORA = ["--model.backbone.lora", "{rank: 4}", "--model.backbone.gradient_checkpointing", "true"]


# Each process takes its time to start.
pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def records(tmp_path):
    (tmp_path / "two.jsonl").write_text("".join(json.dumps(record) + "\n" for record in RECORDS))


def command(*options, folder, steps):
    return [*FIT, *STEPS, *DATA, *options, "--trainer.default_root_dir", folder, "--trainer.max_steps", str(steps)]


def on_two(config, *options, folder, steps):
    """The arguments of a fit with two processes."""
    return command("--config", f"configs/trainer/{config}.yaml", "--trainer.devices", "2", *options,
                   folder=folder, steps=steps)  # fmt: skip


def started(arguments, cwd):
    """A command with processes that Lightning starts, at its end; ``processes`` starts them as torchrun does."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", "lrsa_lit.cli", *arguments], cwd=cwd, env=environment, capture_output=True, text=True
    )


def last(folder):
    return folder / "checkpoints" / "last.ckpt"


def on_one(*options, folder="one", tmp_path, steps):
    main(command("--data.init_args.batch_size", "2", *options, folder=folder, steps=steps))
    return last(tmp_path / folder)


def assert_same(checkpoint, expected):
    found, wanted = load_trained(checkpoint).weights, load_trained(expected).weights
    assert found.keys() == wanted.keys()
    for name, weight in wanted.items():
        torch.testing.assert_close(found[name], weight, atol=2e-5, rtol=1e-3)


def test_ddp_trains_what_one_device_trains(tmp_path):
    alone = on_one(tmp_path=tmp_path, steps=3)
    processes.run(on_two("ddp", folder="two", steps=3), tmp_path)
    assert_same(last(tmp_path / "two"), alone)


def test_fsdp_resumes_and_trains_what_one_device_trains(tmp_path, capfd):
    alone = on_one(*LORA, tmp_path=tmp_path, steps=4)
    processes.run(on_two("fsdp", *LORA, folder="half", steps=2), tmp_path)
    half = last(tmp_path / "half")
    files = [".metadata", "__0_0.distcp", "__1_0.distcp", "meta.pt", "seal.json"]
    assert sorted(path.name for path in half.iterdir()) == files
    processes.run(on_two("fsdp", *LORA, "--ckpt_path", str(half), folder="whole", steps=4), tmp_path)
    whole = last(tmp_path / "whole")
    assert_same(whole, alone)
    assert all("lora_" in name for name in load_trained(whole).weights)
    assert not [path for path in tmp_path.rglob(".*") if path.suffix in (".partial", ".old")]

    capfd.readouterr()
    line = refusal(capfd, "test", *DEBUG, *NO_LOGGER, *LORA, "--ckpt_path", str(whole))
    assert "configs/trainer/fsdp.yaml" in line
    assert "lrsa export" in line


def test_a_fit_goes_on_with_as_many_processes_as_it_had(tmp_path):
    half = on_one(folder="half", tmp_path=tmp_path, steps=2)
    written = processes.refused(on_two("fsdp", "--ckpt_path", str(half), folder="whole", steps=4), tmp_path)
    for text in written:
        (line,) = [line for line in text.splitlines() if "lrsa: error: " in line]
        assert "it was written by 1 process and cannot be resumed with 2" in line
    assert not (tmp_path / "whole" / "checkpoints").exists()


SHARED = "{class_path: lrsa_lit.strategies.SharedDevice, init_args: {processes: 2}}"
WRITERS = """[{class_path: lrsa_lit.callbacks.AnswerWriter},
  {class_path: lrsa_lit.analysis.survival.EvidenceSurvival, init_args: {questions: 3}}]"""


def test_processes_that_share_a_device_find_what_one_does(tmp_path):
    found = []
    for name, options in (("one", []), ("two", ["--trainer.strategy", SHARED])):
        options += ["--data.init_args.eval_batch_size", "3", "--trainer.default_root_dir", name]
        arguments = ["test", *WHOLE, *NO_LOGGER, "--trainer.accelerator", "cpu", "--trainer.callbacks", WRITERS]
        if name == "one":
            main([*arguments, *options])
        else:
            done = started([*arguments, *options], tmp_path)
            assert done.returncode == 0, done.stderr[-3000:]
        (lines,) = (tmp_path / name).rglob("*.jsonl")
        about = json.loads(lines.with_suffix(".json").read_text())
        about.pop("seconds")
        for took in about["measured"].values():
            assert took.pop("first_token_seconds") > 0 < took.pop("token_seconds")
        found.append((lines.read_text(), about))
    assert found[0] == found[1]
    text, about = found[0]
    assert len(text.splitlines()) == 8
    assert about["survival"]["dense"] == {"": None}
    assert about["measured"]["dense"] == dict.fromkeys(("kept", "cache", "peak", "pairs"), 1.0)
    kept = about["survival"]["LRSA"][""]
    assert 0 < kept["chance"] < 1
    assert sum(kept["quarters"]) / 4 == pytest.approx(kept["chance"], abs=1e-3)


def test_a_device_is_not_shared_by_a_fit(tmp_path, capfd):
    error = refusal(capfd, *command("--trainer.strategy", SHARED, folder="shared", steps=1))
    assert "trainer.strategy: 'SharedDevice' is not allowed" in error


CONTEXT = ["--data.init_args.max_tokens", "1024", "--model.lrsa.lag_size", "8", "--model.lrsa.sink_size", "4",
           "--model.lrsa.top_k", "3", "--model.backbone.gradient_checkpointing", "true"]  # fmt: skip


def test_devices_that_share_rows_train_what_one_device_trains(tmp_path):
    alone = on_one(*CONTEXT, "--data.init_args.batch_size", "1", tmp_path=tmp_path, steps=4)
    processes.run(on_two("context_parallel", *CONTEXT, folder="half", steps=2), tmp_path)
    half = last(tmp_path / "half")
    processes.run(on_two("context_parallel", *CONTEXT, "--ckpt_path", str(half), folder="whole", steps=4), tmp_path)
    assert_same(last(tmp_path / "whole"), alone)


def test_devices_that_share_rows_evaluate_by_questions(tmp_path):
    arguments = ["test", *DEBUG, *NO_LOGGER, *CONTEXT[2:], "--trainer.accelerator", "cpu",
                 "--trainer.callbacks", "[{class_path: lrsa_lit.callbacks.AnswerWriter}]"]  # fmt: skip
    main([*arguments, "--trainer.default_root_dir", "one"])
    two = ["--config", "configs/trainer/context_parallel.yaml", "--trainer.devices", "2"]
    processes.run([*arguments, *two, "--trainer.default_root_dir", "two"], tmp_path)
    (one,), (two,) = ([*(tmp_path / name).rglob("*.jsonl")] for name in ("one", "two"))
    assert one.read_text() == two.read_text()
