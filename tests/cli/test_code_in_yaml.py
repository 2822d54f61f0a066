"""YAML from elsewhere names classes: only those of a setting's own kind are made, and no function is called."""

from __future__ import annotations

import pytest
import yaml
from cli_helpers import DEBUG, NO_LOGGER

from lrsa_lit.cli import main
from lrsa_lit.errors import UserError
from lrsa_lit.ops.sparse_attention import Compressor, MeanPool
from lrsa_lit.study import settings

FIT = ["fit", *DEBUG, *NO_LOGGER, "--validate_first", "false", "--trainer.max_steps", "1"]
CALLBACK = "lightning.pytorch.callbacks.LambdaCallback"
LAMBDA = "torch.optim.lr_scheduler.LambdaLR"
FUNCTION = {"class_path": "os.system", "init_args": {"command": "touch made"}}
CLASS = {"class_path": "subprocess.Popen", "init_args": {"args": "touch made", "shell": True}}


def callback(code):
    return {"trainer": {"callbacks": [{"class_path": CALLBACK, "init_args": {"on_fit_start": code}}]}}


SLOTS = {
    "model.lr_scheduler": lambda code: {"model": {"lr_scheduler": code}},
    "model.lr_scheduler.init_args.lr_lambda": lambda code: {
        "model": {"lr_scheduler": {"class_path": LAMBDA, "init_args": {"lr_lambda": code}}}
    },
    "model.optimizer": lambda code: {"model": {"optimizer": code, "lr_scheduler": None}},
    "model.evaluate.x.compressor": lambda code: {"model": {"evaluate": {"x": {"compressor": code}}}},
    "model.train_attention.compressor": lambda code: {"model": {"train_attention": {"compressor": code}}},
    "model.lrsa.compressor": lambda code: {"model": {"lrsa": {"compressor": code}}},
    "model.train_top_k": lambda code: {"model": {"train_top_k": code}},
    "data": lambda code: {"data": code},
    "trainer.callbacks": lambda code: {"trainer": {"callbacks": [code]}},
    "trainer.callbacks.0.init_args.on_fit_start": callback,
    "trainer.profiler": lambda code: {"trainer": {"profiler": code}},
}


@pytest.mark.parametrize("code", [FUNCTION, CLASS], ids=["function", "class"])
@pytest.mark.parametrize(("key", "config"), SLOTS.items(), ids=SLOTS)
def test_code_of_the_standard_library_is_not_run(tmp_path, capfd, key, config, code):
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(config(code)))
    with pytest.raises(SystemExit) as stop:
        main([*FIT, "--config", "x.yaml"])
    assert stop.value.code == 2
    (error,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("lrsa: error: ")]
    assert key in error
    assert code["class_path"] in error
    assert not (tmp_path / "made").exists()


def test_nor_is_it_from_the_command_line(tmp_path, capfd):
    """Where the parser has imported it by then."""
    with pytest.raises(SystemExit) as stop:
        main(
            [
                *FIT,
                "--model.evaluate",
                "{x: {compressor: {class_path: subprocess.getoutput, init_args: {cmd: touch made}}}}",
            ]
        )
    assert stop.value.code == 2
    assert "model.evaluate.x.compressor: class_path 'subprocess.getoutput'" in capfd.readouterr().err
    assert not (tmp_path / "made").exists()


def test_a_module_of_the_standard_library_is_not_imported(tmp_path, capfd):
    (tmp_path / "x.yaml").write_text("trainer: {callbacks: [{class_path: antigravity.Callback}]}")
    with pytest.raises(SystemExit):
        main([*FIT, "--config", "x.yaml"])
    assert "trainer.callbacks.0: class_path 'antigravity.Callback' is not allowed" in capfd.readouterr().err


def test_a_compressor_is_a_compressor(tmp_path, capfd):
    """Any class of the libraries would do as an argument, but not there."""
    with pytest.raises(SystemExit) as stop:
        main([*FIT, "--model.evaluate", "{x: {compressor: {class_path: lightning.pytorch.callbacks.ModelSummary}}}"])
    assert stop.value.code == 2
    assert (
        "model.evaluate.x.compressor: class_path 'lightning.pytorch.callbacks.ModelSummary'" in capfd.readouterr().err
    )


def test_what_is_of_its_kind_is_made(tmp_path, monkeypatch, capfd):
    """A callback of one's own, with an argument of one's own and a function."""
    (tmp_path / "own_parts.py").write_text(
        "from lightning.pytorch import Callback\n"
        "class Part:\n    def __init__(self, size: int): self.size = size\n"
        "def say(trainer, module): print('it began')\n"
        "class Own(Callback):\n    def __init__(self, part: object): self.part = part\n"
        "    def on_fit_start(self, trainer, module): print('size', self.part.size)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    part = {"class_path": "own_parts.Part", "init_args": {"size": 3}}
    own = {"class_path": "own_parts.Own", "init_args": {"part": part}}
    said = {"class_path": CALLBACK, "init_args": {"on_fit_start": "own_parts.say"}}
    pool = {"class_path": "lrsa_lit.ops.sparse_attention.MeanPool"}
    config = {"trainer": {"callbacks": [own, said]}, "model": {"evaluate": {"pool": {"compressor": pool}}}}
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(config))
    main([*FIT, "--config", "x.yaml"])
    shown = capfd.readouterr().out
    assert "size 3" in shown
    assert "it began" in shown


@pytest.mark.parametrize("code", [FUNCTION, CLASS], ids=["function", "class"])
def test_a_study_makes_only_what_is_of_its_kind(tmp_path, code):
    pool = {"class_path": "lrsa_lit.ops.sparse_attention.MeanPool"}
    assert settings.made(pool, Compressor) == MeanPool()
    with pytest.raises(UserError, match=code["class_path"]):
        settings.made(code, Compressor)
    seeded = {"class_path": "lrsa_lit.ops.sparse_attention.RandomTokens", "init_args": {"seed": code}}
    with pytest.raises(UserError, match=code["class_path"]):
        settings.made(seeded, Compressor)
    with pytest.raises(UserError, match="subclass of Compressor"):
        settings.made({"class_path": "torch.nn.Linear"}, Compressor)
    assert not (tmp_path / "made").exists()
