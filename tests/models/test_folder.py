"""A model folder gives the same logits to whoever loads it with transformers or peft."""

import json

import pytest
import torch
from helpers import refused
from transformers import AutoModelForCausalLM, AutoTokenizer

from lrsa_lit.attention import LRSAConfig, disable, enable
from lrsa_lit.models import Backbone, LoRA
from lrsa_lit.models.adapters import RULE_FILE, load_adapters
from lrsa_lit.models.folder import AnotherModel, save_folder
from lrsa_lit.models.tiny import tiny_model, tiny_tokenizer

RULE = LRSAConfig(sink_size=2, lag_size=8, top_k=3)
IDS = torch.arange(60)[None] % 250


@pytest.fixture
def base(tmp_path):
    """A model folder to adapt."""
    save_folder(tiny_model(), tiny_tokenizer(), tmp_path / "base")
    return tmp_path / "base"


def perturbed(model):
    """As after training."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.02)
    return model.eval()


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_whole_model(tmp_path, checkpointing):
    model = perturbed(enable(Backbone("tiny", gradient_checkpointing=checkpointing).build(), RULE))
    save_folder(model, tiny_tokenizer(), tmp_path / "deep/model")
    assert model.config.use_cache is not checkpointing
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "deep/model")
    assert loaded.config.lrsa == RULE.to_dict()
    assert loaded.config.use_cache
    assert torch.equal(logits(enable(loaded, RULE)), logits(model))
    disable(loaded)
    disable(model)
    assert torch.equal(logits(loaded), logits(model))
    assert {path.name for path in (tmp_path / "deep/model").iterdir()} == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
        "chat_template.jinja",
    }  # fmt: skip
    text = "How long is the Isk?"
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "deep/model")
    assert tokenizer(text).input_ids == tiny_tokenizer()(text).input_ids
    assert tokenizer.chat_template == tiny_tokenizer().chat_template


def test_a_dense_model_has_no_rule(tmp_path):
    save_folder(tiny_model(), tiny_tokenizer(), tmp_path / "model")
    assert "lrsa" not in json.loads((tmp_path / "model/config.json").read_text())


def test_weights_of_a_checkpoint(tmp_path):
    model, other = tiny_model(), perturbed(tiny_model())
    before = logits(model.eval())
    save_folder(model, tiny_tokenizer(), tmp_path / "model", weights=other.state_dict())
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "model")), logits(other))
    assert torch.equal(logits(model), before)


def test_adapters(base, monkeypatch, tmp_path):
    from peft import AutoPeftModelForCausalLM, PeftModel

    monkeypatch.chdir(tmp_path)
    model = perturbed(enable(Backbone("./base", lora=LoRA(rank=4)).build(), RULE))
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    expected = logits(model)
    save_folder(perturbed(model), tiny_tokenizer(), tmp_path / "model", weights=weights)
    monkeypatch.chdir("/")
    folder = tmp_path / "model"
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base.resolve())
    assert json.loads((folder / RULE_FILE).read_text()) == RULE.to_dict()
    assert (folder / "adapter_model.safetensors").stat().st_size < (base / "model.safetensors").stat().st_size
    for loaded in (
        AutoModelForCausalLM.from_pretrained(folder),
        AutoPeftModelForCausalLM.from_pretrained(folder),
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder),
    ):
        assert torch.equal(logits(enable(loaded, RULE).eval()), expected), type(loaded)
    assert AutoTokenizer.from_pretrained(folder).chat_template


def test_nothing_is_overwritten_or_left_behind(tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    with pytest.raises(FileExistsError, match="model exists"):
        save_folder(tiny_model(), tiny_tokenizer(), tmp_path / "model")

    def full(*args, **options):
        raise OSError(28, "No space left on device")

    tokenizer = tiny_tokenizer()
    monkeypatch.setattr(tokenizer, "save_pretrained", full)
    with pytest.raises(OSError, match="No space left"):
        save_folder(tiny_model(), tokenizer, tmp_path / "other")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_adapters_are_read_back_by_the_project(base, tmp_path):
    model = perturbed(enable(Backbone(str(base), lora=LoRA(rank=4)).build(), RULE))
    save_folder(model, tiny_tokenizer(), tmp_path / "adapters")
    trained = load_adapters(tmp_path / "adapters")
    assert trained.rule == RULE.to_dict()
    assert torch.equal(logits(enable(trained.build(), RULE).eval()), logits(model))


@pytest.mark.parametrize(
    ("name", "value"),
    [("peft_type", "IA3"), ("use_dora", True), ("megatron_config", {"a": 1}), ("r", "x"), ("r", 0), ("task_type", None),
     ("target_modules", 3), ("base_model_name_or_path", None), ("rank_pattern", {"q_proj": 8}), ("bias", "all")],
)  # fmt: skip
def test_adapters_of_another_kind_are_refused(base, tmp_path, name, value):
    save_folder(Backbone(str(base), lora=LoRA(rank=4)).build(), tiny_tokenizer(), tmp_path / "adapters")
    path = tmp_path / "adapters/adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))
    with refused("model"):
        load_adapters(tmp_path / "adapters").build()


def test_a_model_that_was_written_otherwise_gets_no_name(base, tmp_path, monkeypatch):
    for model in (tiny_model(), Backbone(str(base), lora=LoRA(rank=4)).build()):
        weights = {name: weight.clone() for name, weight in model.state_dict().items()}
        with torch.no_grad():
            next(weight for name, weight in model.named_parameters() if weight.requires_grad).add_(1)
        original = type(model).save_pretrained
        # As if it had not heeded the weights that it was given.
        monkeypatch.setattr(
            type(model), "save_pretrained", lambda self, folder, original=original, **_: original(self, folder)
        )
        with pytest.raises(AnotherModel):
            save_folder(model, tiny_tokenizer(), tmp_path / "other", weights=weights)
        assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("change", [{"rms_norm_eps": 0.1}, {"lrsa": None}, {"rope_parameters": {"rope_theta": 7.0}}])
def test_a_model_whose_config_was_written_otherwise_gets_no_name(tmp_path, monkeypatch, change):
    """All weights may be right."""
    model = enable(tiny_model(), RULE)
    original = type(model).save_pretrained

    def otherwise(self, folder, **options):
        original(self, folder, **options)
        written = json.loads((folder / "config.json").read_text())
        for name, value in change.items():
            written[name] = written[name] | value if isinstance(value, dict) else value
        (folder / "config.json").write_text(json.dumps(written))

    monkeypatch.setattr(type(model), "save_pretrained", otherwise)
    with pytest.raises(AnotherModel, match=next(iter(change))):
        save_folder(model, tiny_tokenizer(), tmp_path / "other")
    assert not list(tmp_path.iterdir())
