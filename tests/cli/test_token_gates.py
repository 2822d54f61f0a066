"""``lrsa token-gates``: gates that a fit, an export and a question go on with, and what is refused."""

import json

import pytest
import torch
from cli_helpers import DEBUG, NO_LOGGER, refusal

from lrsa_lit.cli.main import main
from lrsa_lit.models.checkpoint import load_trained
from lrsa_lit.ops.sparse_attention import TokenGate

SETTINGS = [*DEBUG, *NO_LOGGER, "--data.init_args.val", "null"]
FIT = ["fit", *SETTINGS, "--validate_first", "false", "--model.lr_scheduler", "null"]
GATED = ["--config", "configs/compressor/token_gate.yaml"]


def test_gates_are_fitted_to_a_file_that_a_compressor_takes(tmp_path, capfd):
    main(["token-gates", "--to", "gates.safetensors", *SETTINGS])
    told = capfd.readouterr().out.splitlines()
    assert told[-3] == "Gates of 2 layers x 2 heads, fitted on 7 contexts, are in gates.safetensors"
    assert told[-2].startswith(
        "Contexts held out: 1. Of the 8 of 32 tokens that KVzip would keep there, the gates keep "
    )
    assert not [*tmp_path.glob("runs/**/*")], "no run"
    gates = TokenGate("gates.safetensors")
    assert not gates.gate(0, 2, 2, 64).equal(gates.gate(1, 2, 2, 64))


@pytest.mark.slow
def test_a_model_trains_under_gates_that_stay_the_same(tmp_path, capfd):
    main(["token-gates", "--to", "gates.safetensors", *SETTINGS])
    whole = [*FIT, *GATED, "--trainer.max_steps", "2", "--trainer.default_root_dir", "whole"]
    main(whole)
    # Stopped after a step and resumed it is the same.
    short = [*FIT, *GATED, "--trainer.default_root_dir", "short", "--trainer.max_steps"]
    main([*short, "1"])
    main([*short, "2", "--ckpt_path", "short/checkpoints/last.ckpt"])
    found, expected = (load_trained(tmp_path / folder / "checkpoints/last.ckpt") for folder in ("short", "whole"))
    assert found.rule == expected.rule
    assert found.rule["compressor"]["init_args"]["weights"] == str(tmp_path / "gates.safetensors")
    assert all(torch.equal(weight, expected.weights[name]) for name, weight in found.weights.items())
    main(["export", "whole/checkpoints/last.ckpt", "--out", "model"])
    (tmp_path / "gates.safetensors").rename(tmp_path / "elsewhere.safetensors")
    (tmp_path / "text.txt").write_text("The ferry leaves at noon. " * 20)
    line = refusal(capfd, "ask", "text.txt", "When?", "--model", "model")
    assert "gates.safetensors" in line
    assert "cannot be read (No such file or directory)" in line
    stored = json.loads((tmp_path / "model/config.json").read_text())["lrsa"]["compressor"]["init_args"]
    assert len(stored["sha256"]) == 64


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "--to: is required"),
        (["--to", "a.safetensors", "--model.lrsa.system", "KVzip"], "model.lrsa.system: is not allowed"),
        (["--to", "a.safetensors", "--model.lrsa.lag_size", "2000"], "contexts: '0 of 8' is not allowed"),
    ],
)
def test_mistakes_are_one_line(options, said, capfd):
    assert said in refusal(capfd, "token-gates", *SETTINGS, *options)
