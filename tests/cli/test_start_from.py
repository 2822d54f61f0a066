"""Fits that begin with the weights of another one."""

import pytest
import torch
from cli_helpers import DEBUG, NO_LOGGER, elsewhere, refusal  # noqa: F401 - a fixture of each test

from lrsa_lit.cli.main import main
from lrsa_lit.models.checkpoint import load_trained
from lrsa_lit.models.tiny import tiny_model, tiny_tokenizer

FIT = ["fit", *DEBUG, *NO_LOGGER, "--validate_first", "false", "--data.init_args.val", "null"]
STILL = ["--model.lr_scheduler", "null", "--model.optimizer.init_args.lr", "0.0"]
LORA = ["--model.backbone.lora", "{rank: 2, alpha: 4}"]


def fit(folder, *options, steps=2):
    main([*FIT, *options, "--trainer.default_root_dir", str(folder), "--trainer.max_steps", str(steps)])
    return folder / "checkpoints" / "last.ckpt"


def assert_equal(one, other):
    found, expected = load_trained(one).weights, load_trained(other).weights
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())


@pytest.mark.parametrize("kind", [[], LORA], ids=["all weights", "adapters"])
def test_a_fit_begins_with_the_weights_of_another_one(kind, tmp_path):
    dense = fit(tmp_path / "dense", *kind, "--model.train_attention", "null")
    start = [*kind, "--model.start_from", str(dense)]
    still = fit(tmp_path / "still", *start, *STILL, steps=1)
    assert_equal(still, dense)
    content = torch.load(still, weights_only=True)
    assert content["global_step"] == 1
    assert {state["step"].item() for state in content["optimizer_states"][0]["state"].values()} == {1.0}
    assert content["lrsa_lit"]["rule"] is not None
    # What is resumed, or evaluated, does not look for it again.
    straight = fit(tmp_path / "straight", *start, "--model.lr_scheduler", "null")
    half = fit(tmp_path / "half", *start, "--model.lr_scheduler", "null", steps=1)
    dense.unlink()
    assert_equal(fit(tmp_path / "rest", *start, "--model.lr_scheduler", "null", "--ckpt_path", str(half)), straight)
    with pytest.raises(AssertionError):
        assert_equal(straight, still)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("nothing.ckpt", "nothing.ckpt does not exist"),
        ("damaged.ckpt", "is not a checkpoint written by a fit"),
        ("./nowhere", "is not a folder"),
        (
            "model",
            "it must be a fit's checkpoint (.ckpt), or a folder of adapters; a whole model is a model.backbone.source",
        ),
    ],
)
def test_what_no_fit_begins_with(given, told, tmp_path, capfd):
    (tmp_path / "damaged.ckpt").write_bytes(b"PK")
    if given == "model":
        tiny_model().save_pretrained("model")
        tiny_tokenizer().save_pretrained("model")
    line = refusal(capfd, *FIT, "--model.start_from", given, "--trainer.default_root_dir", "run")
    assert line.startswith("model.start_from: ")
    assert told in line
    assert not list(tmp_path.glob("run/*"))


def test_adapters_and_all_weights_do_not_go_together(tmp_path, capfd):
    adapters = fit(tmp_path / "adapters", *LORA, steps=1)
    line = refusal(capfd, *FIT, "--model.start_from", str(adapters))
    assert "model.start_from: " in line
    assert "holds adapters, but this run trains all weights; convert it by lrsa export" in line
