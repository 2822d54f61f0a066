"""Classes of one's own from the first fit to the questions about what was exported: the worked examples of the docs."""

import json
import sys

import pytest
import torch
import yaml
from cli_helpers import DEBUG, NO_LOGGER, refusal
from plugin_helpers import forget

from lrsa_lit.cli.main import main
from lrsa_lit.models import Backbone
from lrsa_lit.models.checkpoint import describe
from lrsa_lit.models.tiny import tiny_model, tiny_tokenizer

SETTINGS = """
plugins: [key_norm, z_loss]
model:
  lr_scheduler: null
  lrsa: {compressor: {class_path: KeyNorm, init_args: {order: 1.0}}}
  objective: {class_path: Sum, init_args: {objectives: [AnswerLoss, {class_path: ZLoss, init_args: {weight: 0.1}}]}}
data: {class_path: TableCells, init_args: {table: towns.csv, rows: 4, limit: {train: 8, val: 1, test: 2}}}
"""
RUN = [*DEBUG, *NO_LOGGER, "--config", "own.yaml", "--plugins", "table_cells"]
ASK = ["ask", "own.yaml", "What is it?", "--max-new-tokens", "2"]


def test_the_examples_are_as_short_as_they_are_said_to_be(examples):
    assert len(examples["key_norm"].splitlines()) <= 30
    assert len(examples["z_loss"].splitlines()) <= 25
    assert len(examples["table_cells"].splitlines()) <= 60


def last(folder):
    return str(max(folder.rglob("last*.ckpt"), key=lambda path: path.stat().st_mtime))


def test_a_class_of_ones_own_is_trained_resumed_evaluated_exported_and_asked(examples, tmp_path, capfd):
    (tmp_path / "own.yaml").write_text(SETTINGS)
    main(["fit", *RUN, "--trainer.max_steps", "2", "--trainer.val_check_interval", "1"])
    first = last(tmp_path / "runs")
    main(["fit", *RUN, "--trainer.max_steps", "3", "--trainer.val_check_interval", "1", "--ckpt_path", first])
    assert torch.load(last(tmp_path / "runs"), weights_only=True)["global_step"] == 3
    main(["test", *RUN, "--ckpt_path", first])
    main(["predict", *RUN, "--ckpt_path", first])
    assert len(next((tmp_path / "runs").rglob("predictions.jsonl")).read_text().splitlines()) == 2
    # The printed commands and those of the card name the modules without which the model is refused.
    modules = "--plugins key_norm --plugins z_loss --plugins table_cells"
    assert capfd.readouterr().out.count(f"Ask it: lrsa ask {modules} --model ") == 2
    main(["export", first, "--out", "model", "--plugins", "key_norm", "--card"])
    assert "Ask it: lrsa ask --plugins key_norm --model model " in capfd.readouterr().out
    card = (tmp_path / "model" / "README.md").read_text()
    assert "lrsa ask --plugins key_norm --model model " in card
    assert "import key_norm\n" in card
    stored = json.loads((tmp_path / "model/config.json").read_text())["lrsa"]["compressor"]
    assert stored == {"class_path": "key_norm.KeyNorm", "init_args": {"order": 1.0}}
    capfd.readouterr()
    main([*ASK, "--model", "model", "--plugins", "key_norm", "--json"])
    assert json.loads(capfd.readouterr().out)["question"]


def test_a_file_that_names_an_unknown_class_is_refused_with_what_would_make_it_known(tmp_path, capfd):
    (tmp_path / "own.yaml").write_text("a text")
    unknown = {"class_path": "nobodys.norm.Norm", "init_args": {}}
    model = tiny_model()
    model.config.lrsa = {"top_k": 3, "compressor": unknown}
    model.save_pretrained("model")
    tiny_tokenizer().save_pretrained("model")
    checkpoint = {"state_dict": {f"model.{name}": weight for name, weight in model.state_dict().items()}}
    describe(checkpoint, Backbone("tiny"), model.config.lrsa)
    torch.save(checkpoint, "x.ckpt")
    before = sorted(tmp_path.rglob("*"))
    for command in ([*ASK, "--model", "model"], [*ASK, "--model", "x.ckpt"], ["export", "x.ckpt", "--out", "out"]):
        error = refusal(capfd, *command)
        assert "'nobodys.norm.Norm'" in error
        assert "--plugins nobodys.norm " in error
        assert "plugins: [nobodys.norm]" in error
    assert sorted(tmp_path.rglob("*")) == before
    assert "nobodys" not in sys.modules


@pytest.mark.parametrize("command", ["fit", "ask", "export"])
@pytest.mark.parametrize(("name", "reason"), [("nobodys", "No module named 'nobodys'"), ("os", "'os' is not allowed"),
                                              ("twice", "MeanPool")])  # fmt: skip
def test_a_plugin_that_cannot_be_loaded_is_one_line_and_nothing_is_written(
    tmp_path, monkeypatch, capfd, command, name, reason
):
    text = "from lrsa_lit.ops.sparse_attention import Recency\nclass MeanPool(Recency): ...\n"
    (tmp_path / "twice.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "own.yaml").write_text(f"plugins: {name}")
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    before = sorted(tmp_path.rglob("*"))
    arguments = {
        "fit": ["fit", *DEBUG, "--config", "own.yaml"],
        "ask": [*ASK, "--plugins", name],
        "export": ["export", "x.ckpt", "--out", "out", f"--plugins={name}"],
    }[command]
    assert reason in refusal(capfd, *arguments)
    forget("twice")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("key", ["data", "model.lrsa.compressor", "model.objective"])
def test_a_setting_of_an_unknown_class_is_refused_with_what_would_make_it_known(capfd, key):
    line = refusal(capfd, "fit", *DEBUG, f"--{key}", "Nobodys")
    assert line.startswith(f"{key}: Nobodys ")
    assert "--plugins MODULE" in line
    assert "plugins: [MODULE]" in line


@pytest.mark.parametrize("given", [["--plugins"], ["--plugins", "[a"], ["--plugins", "[1]"], ["--plugins", "{a: b}"]])
def test_an_option_without_a_module_is_refused(capfd, given):
    assert "plugins" in refusal(capfd, "fit", *DEBUG, *given)


def test_plugins_of_files_and_of_options_add_up_and_are_recorded(examples, tmp_path, capfd):
    (tmp_path / "own.yaml").write_text(SETTINGS)
    with pytest.raises(SystemExit):
        main(["fit", *RUN, "--plugins=[key_norm, table_cells]", "--print_config"])
    assert yaml.safe_load(capfd.readouterr().out)["plugins"] == ["key_norm", "z_loss", "table_cells"]
