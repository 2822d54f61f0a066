"""A loss that is not a number ends the run before anything of it is saved."""

import pytest
import torch
from cli_helpers import DEBUG, NO_LOGGER, refusal

from lrsa_lit.tasks import LongContextQA

FIT = ["fit", *DEBUG, *NO_LOGGER, "--validate_first", "false", "--trainer.max_steps", "6"]
EARLY = ["--trainer.val_check_interval", "2"]


@pytest.fixture
def poisoned(monkeypatch):
    """Let the loss of one batch be multiplied; returns the ids of the batches by their number."""

    def poison(number, factor):
        step, seen = LongContextQA.training_step, []

        def training_step(self, batch, batch_idx):
            seen.append(batch["id"])
            loss = step(self, batch, batch_idx)
            return loss * factor if len(seen) == number else loss

        monkeypatch.setattr(LongContextQA, "training_step", training_step)
        return seen

    return poison


@pytest.mark.parametrize("factor", [float("nan"), float("inf")])
def test_stops_with_the_step_the_samples_and_the_last_good_checkpoint(elsewhere, poisoned, capfd, factor):
    seen = poisoned(4, factor)
    line = refusal(capfd, *FIT, "--trainer.val_check_interval", "3")
    assert f"the loss is NaN or infinite in step 4, samples {seen[3][0]}; the last good checkpoint is" in line
    saved = line.rpartition(" ")[2]
    state = torch.load(saved, weights_only=True)
    assert state["global_step"] == 3
    assert all(torch.isfinite(weight).all() for weight in state["state_dict"].values() if weight.is_floating_point())
    # At most one step more.
    assert len(seen) == 5


def test_the_first_of_several_batches_of_a_step(poisoned, capfd):
    seen = poisoned(5, float("nan"))
    line = refusal(capfd, *FIT, *EARLY, "--trainer.accumulate_grad_batches", "2")
    assert f"in step 3, samples {seen[4][0]}; the last good checkpoint is" in line


def test_nothing_is_saved_of_the_very_step(elsewhere, poisoned, capfd):
    poisoned(2, float("nan"))
    assert "in step 2" in refusal(capfd, *FIT, *EARLY)
    assert not list((elsewhere / "runs").rglob("*.ckpt"))


def test_the_last_step(poisoned, capfd):
    poisoned(6, float("nan"))
    assert "in step 6" in refusal(capfd, *FIT, "--trainer.val_check_interval", "4")


def test_a_finite_loss_with_weights_that_are_not(elsewhere, monkeypatch, capfd):
    step = torch.optim.AdamW.step

    def spoil(self, *arguments, **options):
        result = step(self, *arguments, **options)
        with torch.no_grad():
            self.param_groups[0]["params"][-1].view(-1)[0] = float("inf")
        return result

    monkeypatch.setattr(torch.optim.AdamW, "step", spoil)
    options = ["--trainer.val_check_interval", "1", "--trainer.limit_val_batches", "1"]
    assert "NaN or infinite" in refusal(capfd, *FIT, *options)
    assert not list((elsewhere / "runs").rglob("*.ckpt"))
