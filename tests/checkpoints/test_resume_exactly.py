"""A fit that is stopped anywhere goes on as if it had not been."""

import contextlib
import json
import os
import random
import re
import signal
from types import SimpleNamespace
from typing import NamedTuple

import kill
import numpy as np
import pytest
import recorded_fit
import torch
import yaml
from cli_helpers import interruptible
from lightning.pytorch.trainer.states import TrainerFn, TrainerState

from lrsa_lit.checkpoints import ExactState, rng
from lrsa_lit.checkpoints.form import KEY
from lrsa_lit.cli.main import main
from lrsa_lit.tasks import LongContextQA

STEPS = 12


class Fit(NamedTuple):
    """A config, and the run of it that nothing stops."""

    arguments: list[str]
    expected: kill.Reference


@pytest.fixture(scope="module")
def fits(tmp_path_factory):
    """Of five batches an epoch: one step each and a validation at each epoch's end, or a step for two of them.

    A fit may end with a validation, and may validate between the two batches of a step.
    """
    root = tmp_path_factory.mktemp("fits")
    recorded_fit.write_records(root / "records.jsonl", 10)
    (root / "common.yaml").write_text(yaml.safe_dump(recorded_fit.common(root / "records.jsonl", STEPS)))
    unpacked = {"data": {"init_args": {"packing": None, "batch_size": 2, "num_workers": 0}}, "model": {"evaluate": {}}}
    full, lora = recorded_fit.cases()
    changes = {
        "plain": (full, {}),
        "ending": (full, {"max_steps": 15}),
        "accumulating": (lora, {"max_steps": 8}),
        "between": (lora, {"max_steps": 8, "val_check_interval": 3}),
    }
    made = {}
    for name, (case, change) in changes.items():
        saving = {"save_on_exception": True, "save_last": True, "monitor": "val/loss"}
        callbacks = case.config["trainer"]["callbacks"]
        callbacks[0]["init_args"] = saving
        (root / f"{name}.yaml").write_text(yaml.safe_dump(case.config))
        (root / f"{name}-changes.yaml").write_text(yaml.safe_dump(unpacked | {"trainer": change}))
        configs = [root / "common.yaml", root / f"{name}.yaml", root / f"{name}-changes.yaml"]
        made[name] = ["fit", *(part for path in configs for part in ("--config", str(path)))]
    return made


@pytest.fixture(scope="module")
def references(fits, tmp_path_factory):
    """The runs that nothing stops, made when they are asked for."""
    made = {}

    def of(name):
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(folder)
                patch.setenv("LRSA_CACHE_DIR", str(folder / "cache"))
                main(fits[name])
            events = {(event["kind"], event["key"]): event["value"] for event in recorded_fit.events(folder)}
            made[name] = kill.Reference(events, torch.load(folder / recorded_fit.LAST, weights_only=True), 0, 0, 0, 0.0)
        return Fit(fits[name], made[name])

    return of


@pytest.fixture
def at(monkeypatch):
    """Do something when a fit records an event, the first time that it does."""

    def at(kind, key, what):
        record, done = recorded_fit.record, []

        def watching(*event):
            record(*event)
            if event[:2] == (kind, key) and not done:
                done.append(event)
                what()

        monkeypatch.setattr(recorded_fit, "record", watching)

    return at


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


STOPS = {
    "mid-epoch": ("plain", "ids", "epoch 1, batch 2"),
    "before a validation at the end of an epoch": ("plain", "loss", "epoch 0, batch 4"),
    "within a validation at the end of an epoch": ("plain", "validation", "step 5, batch 2"),
    "after the validation at the end of an epoch": ("plain", "ids", "epoch 1, batch 0"),
    "between the batches of a step": ("accumulating", "loss", "epoch 1, batch 0"),
    "at the end of an epoch without validation": ("accumulating", "loss", "epoch 1, batch 4"),
    "before a validation between the batches of a step": ("accumulating", "loss", "epoch 1, batch 1"),
    "within the validation of the last step, which accumulated": ("accumulating", "validation", "step 8, batch 1"),
    "within the first validation of the last step": ("ending", "validation", "step 15, batch 0"),
    "within the validation of the last step": ("ending", "validation", "step 15, batch 2"),
    "before the validation of the last step": ("ending", "loss", "epoch 2, batch 4"),
    "before a validation in the middle of a step": ("between", "loss", "epoch 0, batch 2"),
    "within a validation in the middle of a step": ("between", "validation", "step 3, batch 1"),
    "after a validation in the middle of a step": ("between", "ids", "epoch 0, batch 3"),
}


@pytest.mark.parametrize(("name", "kind", "key"), STOPS.values(), ids=STOPS)
def test_a_stopped_fit_goes_on(elsewhere, references, at, capfd, name, kind, key):
    fit = references(name)
    assert (kind, key) in fit.expected.events
    at(kind, key, terminate)
    with pytest.raises(SystemExit) as stop:
        main(fit.arguments)
    assert stop.value.code == 143
    assert f"; continue with --ckpt_path {recorded_fit.LAST}" in capfd.readouterr().err
    main([*fit.arguments, "--ckpt_path", "last"])
    assert kill.differences(fit.expected, elsewhere) == []


ENDS = {
    # As EarlyStopping does, after a validation.
    "in a validation in the middle of a step": ("validation", "step 3, batch 1"),
    # As a time limit does, after a batch: Lightning then validates once more.
    "after the first batch of a step": ("loss", "epoch 1, batch 2"),
    "before the first step is done": ("loss", "epoch 0, batch 0"),
    "after a step": ("loss", "epoch 1, batch 3"),
}


@pytest.mark.parametrize(("kind", "key"), ENDS.values(), ids=ENDS)
def test_a_fit_that_ended_early_goes_on(elsewhere, references, at, monkeypatch, kind, key):
    """It ends well wherever it is in an optimizer step, and saves the weights of the last step."""
    fit, trainers = references("between"), []
    monkeypatch.setattr(
        recorded_fit.Watch, "on_train_start", lambda self, trainer, module: trainers.append(trainer), raising=False
    )
    assert (kind, key) in fit.expected.events
    at(kind, key, lambda: setattr(trainers[0], "should_stop", True))
    main(fit.arguments)
    if steps := trainers[0].global_step:
        assert torch.load(recorded_fit.LAST, weights_only=True)["global_step"] == steps < 8
    main([*fit.arguments, "--ckpt_path", "last"])
    found = kill.differences(fit.expected, elsewhere)
    # A fit ends with a validation, where the one that nothing ends may have none or, by Lightning's count, a later one.
    last = re.compile(r"validation of step .* is not in the other|metric of val/.*")
    assert [difference for difference in found if not last.fullmatch(difference)] == []


@pytest.mark.parametrize(("validates", "steps"), [(True, 6), (False, 5)])
def test_only_a_run_that_validates_makes_room_for_its_last_validation(validates, steps):
    """Without a validation the room would be taken by one more step."""
    progress = {"total": {"started": 1, "processed": 0}}
    loops = {"fit_loop": {"state_dict": {}, "epoch_loop.val_loop.batch_progress": progress}}
    checkpoint = {KEY: {"random": [{}], "loaders": [[]]}, "loops": loops, "global_step": 5}
    epoch_loop = SimpleNamespace(max_steps=5)
    trainer = SimpleNamespace(
        state=TrainerState(fn=TrainerFn.FITTING), world_size=1, global_rank=0, max_steps=5,
        enable_validation=validates, fit_loop=SimpleNamespace(epoch_loop=epoch_loop),
    )  # fmt: skip
    ExactState().on_load_checkpoint(trainer, None, checkpoint)
    assert epoch_loop.max_steps == steps


def test_ctrl_c_waits_for_the_batch(elsewhere, references, at, capfd):
    fit = references("plain")
    at("loss", "epoch 1, batch 2", lambda: os.kill(os.getpid(), signal.SIGINT))
    with interruptible(), pytest.raises(SystemExit) as stop:
        main(fit.arguments)
    assert stop.value.code == 130
    assert "interrupted at step 8; continue with" in capfd.readouterr().err
    main([*fit.arguments, "--ckpt_path", "last"])
    assert kill.differences(fit.expected, elsewhere) == []


def test_a_crash_in_a_batch_loses_nothing(elsewhere, references, monkeypatch):
    fit, step = references("plain"), LongContextQA.training_step

    def broken(self, batch, batch_idx):
        loss = step(self, batch, batch_idx)
        if self.global_step == 7:
            raise RuntimeError("out of memory")
        return loss

    with monkeypatch.context() as patch:
        patch.setattr(LongContextQA, "training_step", broken)
        with pytest.raises(RuntimeError, match="out of memory"):
            main(fit.arguments)
    assert torch.load(recorded_fit.LAST, weights_only=True)["global_step"] == 7
    main([*fit.arguments, "--ckpt_path", "last"])
    assert kill.differences(fit.expected, elsewhere) == []


def test_half_a_step_is_not_saved(elsewhere, references, monkeypatch, caplog):
    step = torch.optim.AdamW.step

    def broken(self, *arguments, **options):
        step(self, *arguments, **options)
        if next(iter(self.state.values()))["step"] == 7:
            raise RuntimeError("in the middle of it")

    monkeypatch.setattr(torch.optim.AdamW, "step", broken)
    with pytest.raises(RuntimeError, match="in the middle of it"):
        main(references("plain").arguments)
    assert torch.load(recorded_fit.LAST, weights_only=True)["global_step"] == 5
    assert "in the middle of an optimizer step" in caplog.text


def test_data_that_were_asked_for_too_early(elsewhere, references, at, monkeypatch):
    """Lightning loses the position in the data where configure_optimizers reads the number of steps."""
    fit, configure = references("plain"), LongContextQA.configure_optimizers

    def early(self):
        assert self.trainer.estimated_stepping_batches
        return configure(self)

    monkeypatch.setattr(LongContextQA, "configure_optimizers", early)
    at("ids", "epoch 1, batch 2", terminate)
    with pytest.raises(SystemExit):
        main(fit.arguments)
    main([*fit.arguments, "--ckpt_path", "last"])
    assert kill.differences(fit.expected, elsewhere) == []


def test_random_states_survive_a_safe_load(tmp_path):
    device = torch.device("cpu")
    np.random.standard_normal()
    random.gauss(0, 1)
    torch.save(rng.capture(device), tmp_path / "state")

    def draw():
        return random.gauss(0, 1), random.random(), np.random.standard_normal(3).tolist(), torch.rand(3).tolist()

    expected = draw()
    draw()
    rng.restore(torch.load(tmp_path / "state", weights_only=True), device)
    assert draw() == expected


@pytest.mark.slow
def test_killed_fits_go_on(tmp_path):
    """In short: python benchmarks/kill.py --trials 30, whose fits are children of this process."""
    with contextlib.suppress(SystemExit):
        kill.main(["--trials", "3", "--steps", "12", "--json", str(tmp_path / "found")])
    found = json.loads((tmp_path / "found").read_text())
    assert [result["differences"] for result in found["results"]] == [[]] * 3
    assert found["inside_a_write"]
    assert found["mid_epoch_after_checkpoint"]
