"""``lrsa export``: a checkpoint becomes a folder that transformers loads."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from cli_helpers import DEBUG, NO_LOGGER
from torch.distributed import checkpoint as distributed
from transformers import AutoModelForCausalLM, AutoTokenizer

from lrsa_lit.attention import enable
from lrsa_lit.cli import main
from lrsa_lit.models import Backbone
from lrsa_lit.models.checkpoint import load_trained
from lrsa_lit.models.checkpoint_file import META
from lrsa_lit.models.tiny import tiny_model, tiny_tokenizer
from lrsa_lit.ops.sparse_attention import LRSAConfig

FIT = ["fit", *DEBUG, *NO_LOGGER, "--validate_first", "false", "--data.init_args.val", "null"]
# Steps that are large enough to tell the trained model from the base.
STEPS = ["--trainer.max_steps", "2", "--model.optimizer.init_args.lr", "0.01"]
LORA = ["--model.backbone.lora", "{rank: 4}"]
IDS = torch.randint(3, 259, (1, 200), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def base(tmp_path):
    """A model in a folder, to be trained."""
    model = tiny_model(seed=3)
    model.generation_config.max_new_tokens = 77
    model.save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


@pytest.fixture
def fit(tmp_path, capfd):
    """Run a fit; returns its checkpoint."""

    def run(*options):
        main([*FIT, *STEPS, *options])
        capfd.readouterr()
        return max((tmp_path / "runs").rglob("last*.ckpt"), key=lambda path: path.stat().st_mtime)

    return run


@torch.no_grad()
def logits(model):
    """Under the rule that the model says it was trained with."""
    rule = getattr(model.config, "lrsa", None)
    model.eval()
    return (model if rule is None else enable(model, LRSAConfig.from_dict(rule)))(IDS).logits


@torch.no_grad()
def trained_logits(checkpoint):
    trained = load_trained(checkpoint)
    model = trained.build().eval()
    return (model if trained.rule is None else enable(model, LRSAConfig.from_dict(trained.rule)))(IDS).logits


def sharded(checkpoint, folder):
    """The checkpoint as several devices would have written it."""
    whole = torch.load(checkpoint, weights_only=True)
    tensors = {"state_dict": whole.pop("state_dict"), "optimizer_0": whole.pop("optimizer_states")[0]}
    distributed.save(tensors, checkpoint_id=folder, no_dist=True)
    torch.save(whole, folder / META)
    return folder


@pytest.mark.parametrize("options", [[], LORA], ids=["full", "lora"])
@pytest.mark.parametrize("form", ["file", "sharded"])
def test_logits_are_those_of_the_checkpoint(options, form, base, fit, tmp_path, capfd):
    checkpoint = fit("--model.backbone.source", base, *options)
    given = checkpoint if form == "file" else sharded(checkpoint, tmp_path / "sharded.ckpt")
    main(["export", str(given), "--out", "out/model"])
    assert "Model of" in capfd.readouterr().out
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out/model")
    expected = trained_logits(checkpoint)
    torch.testing.assert_close(logits(exported), expected, atol=1e-4, rtol=1e-4)
    untrained = enable(Backbone(base).build(), LRSAConfig.from_dict(exported.config.lrsa))
    assert not torch.allclose(logits(untrained), expected, atol=1e-2)
    assert exported.config.lrsa["top_k"] == 8
    assert exported.config.use_cache
    assert exported.generation_config.max_new_tokens == 77
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out/model")
    assert tokenizer.chat_template == tiny_tokenizer().chat_template
    files = {path.name for path in (tmp_path / "out").rglob("*")}
    assert "model.safetensors" in files
    assert not [name for name in files if name.startswith(".") or name.endswith((".bin", ".pt"))]


def test_adapters_alone(base, fit, tmp_path):
    import peft

    checkpoint = fit("--model.backbone.source", base, *LORA)
    main(["export", str(checkpoint), "--out", "adapters", "--adapters"])
    saved = json.loads((tmp_path / "adapters/adapter_config.json").read_text())
    assert saved["base_model_name_or_path"] == base
    assert not (tmp_path / "adapters/config.json").exists()
    found = peft.PeftModel.from_pretrained(tiny_model(seed=3), tmp_path / "adapters").eval()
    enable(found, LRSAConfig.from_dict(json.loads((tmp_path / "adapters/lrsa.json").read_text())))
    with torch.no_grad():
        torch.testing.assert_close(found(IDS).logits, trained_logits(checkpoint))


def test_four_bits_become_the_weights_that_were_trained_on(base, fit, tmp_path):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    checkpoint = fit("--model.backbone.source", base, *LORA, "--model.backbone.quantization", "nf4")
    main(["export", str(checkpoint), "--out", "model"])
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert "quantization_config" not in json.loads((tmp_path / "model/config.json").read_text())
    # Weights and not logits: on a CPU bitsandbytes multiplies in less than float32.
    layer = load_trained(checkpoint).build().get_base_model().model.layers[1].mlp.up_proj
    below, inner, outer = layer.base_layer.weight, layer.lora_A["default"].weight, layer.lora_B["default"].weight
    expected = bitsandbytes.functional.dequantize_4bit(below.data, below.quant_state)
    expected = expected + layer.scaling["default"] * outer @ inner
    assert outer.abs().max() > 1e-3
    torch.testing.assert_close(exported.model.layers[1].mlp.up_proj.weight, expected)


def test_dense_training_scaled_positions_and_another_dtype(fit, tmp_path):
    checkpoint = fit("--model.train_attention", "null", "--model.backbone.rope_scaling", "{rope_type: yarn, factor: 2}")
    main(["export", str(checkpoint), "--out", "model", "--dtype", "bfloat16"])
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert not hasattr(exported.config, "lrsa")
    assert exported.config.rope_parameters["rope_type"] == "yarn"
    assert exported.config.max_position_embeddings == 16384
    assert exported.dtype == torch.bfloat16


def test_a_model_is_replaced_when_asked_for_and_nothing_else_is(fit, tmp_path, capfd):
    checkpoint = str(fit())
    (tmp_path / "empty").mkdir()
    main(["export", checkpoint, "--out", "empty"])
    config = tmp_path / "empty/config.json"
    config.write_text("{}")
    main(["export", checkpoint, "--out", "empty", "--force"])
    assert json.loads(config.read_text())["model_type"] == "llama"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/letter.txt").write_text("dear")
    capfd.readouterr()
    refused = [(["empty"], "--force"), (["mine"], "--force"), (["mine", "--force"], "holds no model")]
    for options, named in [*refused, (["."], "working directory")]:
        with pytest.raises(SystemExit) as stop:
            main(["export", checkpoint, "--out", *options])
        assert stop.value.code == 2
        assert named in capfd.readouterr().err
    assert (tmp_path / "mine/letter.txt").read_text() == "dear"
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_failed_export_leaves_the_model_that_was_there(fit, tmp_path, capfd, monkeypatch):
    checkpoint = str(fit())
    main(["export", checkpoint, "--out", "model"])
    before = (tmp_path / "model/model.safetensors").read_bytes()

    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("transformers.PreTrainedTokenizerFast.save_pretrained", full)
    with pytest.raises(SystemExit) as stop:
        main(["export", checkpoint, "--out", "model", "--force"])
    assert stop.value.code == 2
    assert "--out: model cannot be written (No space left on device)" in capfd.readouterr().err
    assert (tmp_path / "model/model.safetensors").read_bytes() == before
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_checkpoints_that_are_none(fit, tmp_path, capfd):
    checkpoint = fit()
    truncated = sharded(checkpoint, tmp_path / "truncated.ckpt")
    next(truncated.glob("*.distcp")).unlink()
    (tmp_path / "junk.ckpt").write_text("no")
    (tmp_path / "folder").mkdir()
    for name in ("nowhere.ckpt", "junk.ckpt", "folder", "truncated.ckpt"):
        with pytest.raises(SystemExit) as stop:
            main(["export", name, "--out", "out"])
        assert stop.value.code == 2
        (line,) = [line for line in capfd.readouterr().err.splitlines() if "error" in line]
        what = ": no such file" if name == "nowhere.ckpt" else " is no checkpoint"
        assert line.startswith(f"lrsa: error: CKPT: {name}{what}")
    assert not (tmp_path / "out").exists()


def test_adapters_where_there_are_none_or_not_enough(fit, capfd):
    with pytest.raises(SystemExit):
        main(["export", str(fit()), "--out", "out", "--adapters"])
    assert "--adapters: " in capfd.readouterr().err
    checkpoint = fit(*LORA, "--model.backbone.rope_scaling", "{rope_type: yarn, factor: 2}")
    with pytest.raises(SystemExit):
        main(["export", str(checkpoint), "--out", "out", "--adapters"])
    assert "model.backbone.rope_scaling" in capfd.readouterr().err


def test_mistakes_are_told_before_anything_is_imported(capfd, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(SystemExit) as stop:
        main(["export", "x.ckpt"])
    assert stop.value.code == 2
    assert "--out" in capfd.readouterr().err
