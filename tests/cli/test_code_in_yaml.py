"""YAML from elsewhere names classes: only those of a setting's own kind are made, and no function is called."""

from typing import Protocol, TypedDict

import pytest
import yaml
from cli_helpers import DEBUG, NO_LOGGER, refusal
from helpers import refused
from lightning.pytorch import Callback

from lrsa_lit.attention import LRSAConfig
from lrsa_lit.classes import check_classes
from lrsa_lit.cli.fit_settings import FitSettings
from lrsa_lit.cli.main import main
from lrsa_lit.errors import UserError
from lrsa_lit.ops.sparse_attention import MeanPool

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
    "model.objective": lambda code: {"model": {"objective": code}},
    "objectives": lambda code: {"model": {"objective": {"class_path": "Sum", "init_args": {"objectives": [code]}}}},
    "data": lambda code: {"data": code},
    "trainer.callbacks": lambda code: {"trainer": {"callbacks": [code]}},
    "trainer.callbacks.0.init_args.on_fit_start": callback,
    "trainer.profiler": lambda code: {"trainer": {"profiler": code}},
}


@pytest.mark.parametrize("code", [FUNCTION, CLASS], ids=["function", "class"])
@pytest.mark.parametrize(("key", "config"), SLOTS.items(), ids=SLOTS)
def test_code_of_the_standard_library_is_not_run(tmp_path, capfd, key, config, code):
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(config(code)))
    error = refusal(capfd, *FIT, "--config", "x.yaml")
    assert key in error
    assert code["class_path"] in error
    assert not (tmp_path / "made").exists()


HANDLER = "torch.distributed.elastic.multiprocessing.subprocess_handler.SubprocessHandler"


def test_nor_is_a_class_of_the_libraries_that_runs_a_command(tmp_path, monkeypatch, capfd):
    """Where an argument's annotation does not ask for such a class."""
    (tmp_path / "open_parts.py").write_text(
        "from lightning.pytorch import Callback\nclass Open(Callback):\n    def __init__(self, part: object): pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    given = {"entrypoint": "touch", "args": ["made"], "env": {}, "stdout": None, "stderr": None, "local_rank_id": 0}
    part = {"class_path": HANDLER, "init_args": given}
    config = {"trainer": {"callbacks": [{"class_path": "open_parts.Open", "init_args": {"part": part}}]}}
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(config))
    error = refusal(capfd, *FIT, "--config", "x.yaml")
    assert f"trainer.callbacks.0.init_args.part.class_path: '{HANDLER}' is not allowed" in error
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
    assert "model.evaluate.x.compressor.class_path: 'subprocess.getoutput'" in capfd.readouterr().err
    assert not (tmp_path / "made").exists()


def test_a_module_of_the_standard_library_is_not_imported(tmp_path, capfd):
    (tmp_path / "x.yaml").write_text("trainer: {callbacks: [{class_path: antigravity.Callback}]}")
    error = refusal(capfd, *FIT, "--config", "x.yaml")
    assert "trainer.callbacks.0.class_path: 'antigravity.Callback' is not allowed" in error


def test_a_compressor_is_a_compressor(tmp_path, capfd):
    """Any class of the libraries would do as an argument, but not there."""
    error = refusal(
        capfd, *FIT, "--model.evaluate", "{x: {compressor: {class_path: lightning.pytorch.callbacks.ModelSummary}}}"
    )
    assert "model.evaluate.x.compressor.class_path: 'lightning.pytorch.callbacks.ModelSummary'" in error


def test_what_is_of_its_kind_is_made(tmp_path, monkeypatch, capfd):
    """A callback of one's own, with an argument of one's own and a function."""
    (tmp_path / "own_parts.py").write_text(
        "from lightning.pytorch import Callback\n"
        "class Part:\n    def __init__(self, size: int): self.size = size\n"
        "def say(trainer, module): print('it began')\n"
        "class Own(Callback):\n    def __init__(self, part: object): self.part = part\n"
        "    def on_fit_start(self, trainer, module): print('size', self.part.size)\n"
    )
    (tmp_path / "more_parts.py").write_text(
        "import own_parts, torch\n"
        "from lightning.pytorch import Callback\n"
        "class More(Callback):\n"
        "    def __init__(self, part: own_parts.Part | None, losses: list[torch.nn.Module]): self.losses = losses\n"
        "    def on_fit_start(self, trainer, module): print('losses', *self.losses)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    part = {"class_path": "own_parts.Part", "init_args": {"size": 3}}
    own = {"class_path": "own_parts.Own", "init_args": {"part": part}}
    losses = [{"class_path": "torch.nn.MSELoss"}]
    more = {"class_path": "more_parts.More", "init_args": {"part": part, "losses": losses}}
    said = {"class_path": CALLBACK, "init_args": {"on_fit_start": "own_parts.say"}}
    pool = {"class_path": "lrsa_lit.ops.sparse_attention.MeanPool"}
    config = {"trainer": {"callbacks": [own, more, said]}, "model": {"evaluate": {"pool": {"compressor": pool}}}}
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(config))
    main([*FIT, "--config", "x.yaml"])
    shown = capfd.readouterr().out
    assert "size 3" in shown
    assert "losses MSELoss()" in shown
    assert "it began" in shown


class Sized(Protocol):
    size: int


class Typed(TypedDict):
    size: int


class Odd(Callback):
    def __init__(self, part: Sized | Typed | None) -> None: ...


def test_an_annotation_that_has_no_subclasses_admits_none():
    own = {"class_path": "torch.nn.Linear", "init_args": {}}
    with refused("x.init_args.part.class_path", "torch.nn.Linear"):
        check_classes("x", {"class_path": f"{__name__}.Odd", "init_args": {"part": own}}, (Callback,), {})


@pytest.mark.parametrize("code", [FUNCTION, CLASS], ids=["function", "class"])
def test_a_study_makes_only_what_is_of_its_kind(tmp_path, code):
    made = FitSettings().made
    pool = {"class_path": "lrsa_lit.ops.sparse_attention.MeanPool"}
    assert made("x", LRSAConfig, {"compressor": pool}).compressor == MeanPool()
    seeded = {"class_path": "lrsa_lit.ops.sparse_attention.RandomTokens", "init_args": {"seed": code}}
    for compressor in (code, seeded, {"class_path": "torch.nn.Linear"}):
        with pytest.raises(UserError) as error:
            made("x", LRSAConfig, {"compressor": compressor})
        assert error.value.field.startswith("x.compressor")
    assert not (tmp_path / "made").exists()
