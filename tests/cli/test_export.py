"""``lrsa export``: a checkpoint becomes a folder that transformers loads."""

import json
import os
import stat
import sys

import peft
import pytest
import torch
import yaml
from cli_helpers import DEBUG, NO_LOGGER, refusal
from torch.distributed import checkpoint as distributed
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from lrsa_lit.attention import LRSAConfig, enable
from lrsa_lit.cli.main import main
from lrsa_lit.models import Backbone, LoRA
from lrsa_lit.models.checkpoint import describe, load_trained, trained_weights
from lrsa_lit.models.checkpoint_file import META
from lrsa_lit.models.tiny import tiny_config, tiny_model, tiny_tokenizer

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
    checkpoint = fit("--model.backbone.source", base, *LORA)
    main(["export", str(checkpoint), "--out", "adapters", "--adapters"])
    saved = json.loads((tmp_path / "adapters/adapter_config.json").read_text())
    assert saved["base_model_name_or_path"] == base
    assert not (tmp_path / "adapters/config.json").exists()
    found = peft.PeftModel.from_pretrained(tiny_model(seed=3), tmp_path / "adapters").eval()
    enable(found, LRSAConfig.from_dict(json.loads((tmp_path / "adapters/lrsa.json").read_text())))
    with torch.no_grad():
        torch.testing.assert_close(found(IDS).logits, trained_logits(checkpoint))


@pytest.fixture
def tied(tmp_path):
    """A model whose output head is its input embeddings."""
    config = tiny_config()
    config.tie_word_embeddings = True
    LlamaForCausalLM(config).save_pretrained(tmp_path / "tied")
    tiny_tokenizer().save_pretrained(tmp_path / "tied")
    return str(tmp_path / "tied")


@pytest.mark.parametrize("modules", ["[lm_head, q_proj]", "[embed_tokens]", "[lm_head, embed_tokens]", "[q_proj]"])
def test_adapted_ends_of_a_tied_model(modules, tied, tmp_path):
    """Trained by noise: what a fit would come to is not the question."""
    lora = LoRA(rank=4, target_modules=yaml.safe_load(modules))
    backbone = Backbone(tied, lora=lora)
    model = backbone.build()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(torch.randn_like(weight), alpha=0.1)
    checkpoint = {"state_dict": {f"model.{name}": w for name, w in trained_weights(backbone, model).items()}}
    describe(checkpoint, backbone, None)
    torch.save(checkpoint, "x.ckpt")
    main(["export", "x.ckpt", "--out", "merged"])
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(exported), logits(model), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(logits(exported), logits(AutoModelForCausalLM.from_pretrained(tied)), atol=1e-2)
    assert exported.config.tie_word_embeddings == (modules == "[q_proj]")


def test_another_model_gets_no_name(fit, base, tmp_path, capfd, monkeypatch):
    """Whatever makes an export another model than the one that was trained, merging or writing."""
    checkpoint = str(fit("--model.backbone.source", base, *LORA))
    for owner, name in ((peft.tuners.lora.Linear, "merge"), (LlamaForCausalLM, "save_pretrained")):
        original = getattr(owner, name)

        def spoil(self, *arguments, original=original, **options):
            with torch.no_grad():
                next(self.parameters()).add_(0.1)
            return original(self, *arguments, **options)

        with monkeypatch.context() as patch:
            patch.setattr(owner, name, spoil)
            assert "--out: spoilt was not written" in refusal(capfd, "export", checkpoint, "--out", "spoilt")
        assert not [path for path in tmp_path.iterdir() if "spoilt" in path.name]


def test_the_umask_decides_who_may_read(fit, tmp_path):
    before = os.umask(0o027)
    try:
        main(["export", str(fit()), "--out", "model"])
    finally:
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "model").iterdir()} == {0o640}
    assert stat.S_IMODE((tmp_path / "model").stat().st_mode) == 0o750


def test_a_link_is_not_replaced(fit, tmp_path, capfd):
    checkpoint = str(fit())
    main(["export", checkpoint, "--out", "model"])
    (tmp_path / "link").symlink_to("model")
    before = (tmp_path / "model/model.safetensors").read_bytes()
    assert "--out: link is a link to model" in refusal(capfd, "export", checkpoint, "--out", "link", "--force")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "model/model.safetensors").read_bytes() == before


@pytest.mark.parametrize("out", ["a\0b", "x" * 5000, ".", ".."])
def test_folders_that_cannot_be(out, capfd):
    assert "--out: " in refusal(capfd, "export", "x.ckpt", "--out", out)


def test_a_model_with_code_of_its_own(base, tmp_path, capfd):
    """It runs only when it is asked for, and none of it is exported."""
    config = json.loads((tmp_path / "base/config.json").read_text())
    classes = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    (tmp_path / "base/config.json").write_text(json.dumps(config | {"model_type": "own", "auto_map": classes}))
    (tmp_path / "base/own.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class OwnConfig(LlamaConfig): model_type = 'own'\n"
        "class OwnModel(LlamaForCausalLM): config_class = OwnConfig\n"
    )
    backbone = Backbone(base, trust_remote_code=True)
    checkpoint = {"state_dict": {f"model.{name}": w for name, w in backbone.build().state_dict().items()}}
    describe(checkpoint, backbone, None)
    torch.save(checkpoint, "x.ckpt")
    assert "--trust-remote-code: " in refusal(capfd, "export", "x.ckpt", "--out", "model")
    main(["export", "x.ckpt", "--out", "model", "--trust-remote-code"])
    assert not list((tmp_path / "model").glob("*.py"))
    # Where the code is, whoever loads the folder may decide to run it.
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "model", trust_remote_code=True)
    assert torch.equal(logits(exported), logits(backbone.build()))


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
    refused = [(["empty"], "--force"), (["mine"], "--force"), (["mine", "--force"], "contains no model")]
    for options, named in [*refused, (["."], "working directory")]:
        assert named in refusal(capfd, "export", checkpoint, "--out", *options)
    assert (tmp_path / "mine/letter.txt").read_text() == "dear"
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_failed_export_leaves_the_model_that_was_there(fit, tmp_path, capfd, monkeypatch):
    checkpoint = str(fit())
    main(["export", checkpoint, "--out", "model"])
    before = (tmp_path / "model/model.safetensors").read_bytes()

    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("transformers.PreTrainedTokenizerFast.save_pretrained", full)
    error = refusal(capfd, "export", checkpoint, "--out", "model", "--force")
    assert "--out: model cannot be written (No space left on device)" in error
    assert (tmp_path / "model/model.safetensors").read_bytes() == before
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_checkpoints_that_are_none(fit, tmp_path, capfd):
    checkpoint = fit()
    truncated = sharded(checkpoint, tmp_path / "truncated.ckpt")
    next(truncated.glob("*.distcp")).unlink()
    (tmp_path / "junk.ckpt").write_text("no")
    (tmp_path / "folder").mkdir()
    for name in ("nowhere.ckpt", "junk.ckpt", "folder", "truncated.ckpt"):
        line = refusal(capfd, "export", name, "--out", "out")
        what = "does not exist" if name == "nowhere.ckpt" else "is not a checkpoint"
        assert line.startswith(f"CKPT: {name} {what}")
    assert not (tmp_path / "out").exists()


def test_adapters_where_there_are_none_or_not_enough(fit, capfd):
    assert "--adapters: " in refusal(capfd, "export", str(fit()), "--out", "out", "--adapters")
    checkpoint = fit(*LORA, "--model.backbone.rope_scaling", "{rope_type: yarn, factor: 2}")
    assert "--adapters: " in refusal(capfd, "export", str(checkpoint), "--out", "out", "--adapters")


def test_mistakes_are_told_before_anything_is_imported(capfd, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    assert "--out" in refusal(capfd, "export", "x.ckpt")
