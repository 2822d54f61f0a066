"""Latents of low rank from the command line: moments, fits, checkpoints, exports, questions, and what is refused."""

import json

import pytest
import torch
from cli_helpers import DEBUG, NO_LOGGER, refusal
from transformers import AutoModelForCausalLM

from lrsa_lit.attention.low_rank_linear import LowRankLinear
from lrsa_lit.cli.main import main
from lrsa_lit.models import whitening
from lrsa_lit.models.checkpoint import load_trained

SETTINGS = [*DEBUG, *NO_LOGGER, "--data.init_args.val", "null"]
FIT = ["fit", *SETTINGS, "--validate_first", "false", "--model.lr_scheduler", "null"]
NARROW = ["--model.backbone.low_rank.ratio", "0.5", "--model.backbone.low_rank.whitening", "moments.safetensors"]
LORA = ["--model.backbone.lora.rank", "2"]


def fitted(folder, steps, *options):
    main([*FIT, *options, "--trainer.default_root_dir", folder, "--trainer.max_steps", str(steps)])
    return load_trained(f"{folder}/checkpoints/last.ckpt")


def test_moments_are_the_same_each_time(tmp_path, capfd):
    main(["input-moments", "--to", "moments.safetensors", "--contexts", "3", "--tokens", "100", *SETTINGS])
    told = capfd.readouterr().out.splitlines()
    assert told[-2] == (
        "Moments of the inputs of 2 layers, of width 64, over 3 contexts of 300 tokens are in moments.safetensors"
    )
    main(["input-moments", "--to", "again.safetensors", "--contexts", "3", "--tokens", "100", *SETTINGS])
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "moments.safetensors").read_bytes()
    assert not [*tmp_path.glob("runs/**/*")], "no run"
    assert whitening.read(tmp_path / "moments.safetensors").shape == (2, 64, 64)


@pytest.mark.slow
@pytest.mark.parametrize("lora", [[], LORA])
def test_factors_train_and_stay_those_of_the_checkpoint(tmp_path, capfd, lora):
    main(["input-moments", "--to", "moments.safetensors", *SETTINGS])
    whole = fitted("whole", 2, *NARROW, *lora)
    fitted("short", 1, *NARROW, *lora)
    short = fitted("short", 2, *NARROW, *lora, "--ckpt_path", "short/checkpoints/last.ckpt")
    assert whole.weights.keys() == short.weights.keys()
    assert all(torch.equal(weight, whole.weights[name]) for name, weight in short.weights.items())
    # The checkpoint has all that is needed.
    (tmp_path / "moments.safetensors").unlink()
    model = whole.build()
    layers = [module for module in model.modules() if isinstance(module, LowRankLinear)]
    assert [layer.ranks for layer in layers] == [(16,)] * 4
    main(["export", "whole/checkpoints/last.ckpt", "--out", "model"])
    assert (tmp_path / "model/low_rank.safetensors").is_file()
    plain = AutoModelForCausalLM.from_pretrained("model")
    ids = torch.arange(3, 60)[None]
    with torch.no_grad():
        assert torch.allclose(plain(ids).logits, model.eval()(ids).logits, atol=1e-4)
    (tmp_path / "text.txt").write_text("The ferry leaves at noon. " * 20)
    answers = []
    for named in ("model", "whole/checkpoints/last.ckpt"):
        capfd.readouterr()
        main(["ask", "--json", "text.txt", "When?", "--model", named, "--max-new-tokens", "5"])
        answers.append(json.loads(capfd.readouterr().out.splitlines()[-1])["answer"])
    assert answers[0] == answers[1]
    if lora:
        line = refusal(capfd, "export", "whole/checkpoints/last.ckpt", "--out", "adapters", "--adapters")
        assert line.startswith("--adapters: a folder of adapters cannot hold low-rank factors")
    line = refusal(capfd, *FIT, "--model.backbone.source", "model", "--model.backbone.low_rank.rank", "3")
    assert line.startswith("model.backbone.low_rank: 'model' has low-rank factors already; leave low_rank out")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["low_rank.rank=33"], "model.backbone.low_rank.rank: 33 is not allowed; it must be at most 32, the width of"),
        (["low_rank.ratio=2"], "model.backbone.low_rank.ratio: 2.0 is not allowed; it must be above 0 and at most 1"),
        (
            ["low_rank.ratio=0.5", "low_rank.whitening=none.safetensors"],
            "model.backbone.low_rank.whitening: 'none.safetensors' is not a file; write it with `lrsa input-moments",
        ),
        (["low_rank.rank=3", "low_rank.dense_layers=[7]"], "model.backbone.low_rank.dense_layers: [7] is not allowed"),
        (["low_rank.ranks=3"], "model.backbone.low_rank.ranks: no such setting; the nearest are model.backbone.low_r"),
    ],
)
def test_mistakes_are_one_line(options, said, capfd):
    line = refusal(capfd, *FIT, *(f"--model.backbone.{option}" for option in options))
    assert line.startswith(said)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "--to: is required"),
        (["--to", "m", "--model.backbone.low_rank.rank", "3"], "model.backbone.low_rank: is not allowed: moments are"),
        (["--to", "m", "--contexts", "0"], "--contexts: '0' is not allowed"),
    ],
)
def test_mistakes_of_the_measurement_are_one_line(options, said, capfd):
    assert refusal(capfd, "input-moments", *SETTINGS, *options).startswith(said)


def test_an_estimate_counts_the_factors(capfd):
    estimate = [*FIT, "--estimate", "--data.init_args.max_tokens", "400"]
    main([*estimate, "--model.backbone.low_rank.ratio", "0.25"])
    narrow = capfd.readouterr().out
    main(estimate)
    assert narrow != capfd.readouterr().out


@pytest.mark.slow
def test_an_evaluation_measures_what_a_cache_of_latents_holds(tmp_path):
    given = "{latents: {latents: true}, everything: {top_k: 32, latents: true}, dense: null}"
    narrow = "{ratio: 0.25, grouping: head}"
    short = ["--data.init_args.limit", "{test: 2}", "--model.max_new_tokens", "3"]
    test = ["test", *SETTINGS, *short, "--model.evaluate", given, "--model.backbone.low_rank", narrow]
    main(test)
    cache = {name: each["cache"] for name, each in facts(tmp_path, 1)["measured"].items()}
    # Of a head a pair is 2 x 16 numbers, and a latent 2 x 4 and a position.
    assert cache["latents"] == pytest.approx(cache["LRSA"] * 36 / 128)
    assert cache["everything"] == pytest.approx(36 / 128)
    assert cache["dense"] == 1.0
    lines = (tmp_path / "runs/test-1/answers.jsonl").read_text().splitlines()
    for line in map(json.loads, lines):
        assert line["LRSA"]["loss"] == pytest.approx(line["latents"]["loss"], abs=1e-4)
        assert line["dense"]["loss"] == pytest.approx(line["everything"]["loss"], abs=1e-4)
        assert line["LRSA"]["prediction"] == line["latents"]["prediction"]
    main([*test, "--budget", "0.1"])
    kept = {name: each["kept"] for name, each in facts(tmp_path, 2)["measured"].items()}
    # A tenth of 4,096 tokens is 410 pairs, or 1,456 latents: K of each of 126 partitions, sinks, and a window of 60.
    assert kept == {"LRSA": 2 / 32, "latents": 11 / 32, "everything": 11 / 32, "dense": 1.0}


def facts(folder, number):
    return json.loads((folder / f"runs/test-{number}/answers.json").read_text())
