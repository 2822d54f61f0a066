"""The shipped models and ways to train them: true shapes with random weights, and the table of what fits."""

import functools
import gc
import re
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from helpers import quiet_trainer, refused
from torch.utils.data import DataLoader
from transformers import AutoConfig, AutoModelForCausalLM

from lrsa_lit.attention import LRSAConfig, enable
from lrsa_lit.attention.families import check_config
from lrsa_lit.data.collate import collate
from lrsa_lit.models import Backbone, LoRA
from lrsa_lit.models.tiny import tiny_tokenizer
from lrsa_lit.tasks import LongContextQA

ROOT = Path(__file__).parents[2]
SHAPES = ROOT / "benchmarks" / "shapes"
# The publishers' counts hold the shapes: widths, layers, tied heads, norms of queries and keys.
PARAMETERS = {
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "llama-3.1-8b": 8_030_261_248,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "smollm3-3b": 3_075_098_624,
    "mistral-7b-v0.3": 7_248_023_552,
    "olmo-2-1b": 1_484_916_736,
    "olmo-2-7b": 7_298_617_344,
    "phi-4": 14_659_507_200,
}
MODELS = ROOT / "docs" / "how-to" / "models.md"
GPUS = [24e9, 80e9, 141e9, 2 * 141e9]
"""The columns of the table, in bytes."""
SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
FAMILIES = ["llama-3.2-1b", "qwen3-0.6b", "smollm3-3b", "mistral-7b-v0.3", "olmo-2-1b", "phi-4"]
RULE = LRSAConfig(sink_size=4, lag_size=16, top_k=4)
TOKENS = 90


def shape(name, layers=2, **changes):
    config = AutoConfig.from_pretrained(str(SHAPES / name))
    config.num_hidden_layers = layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:layers]
    for key, value in changes.items():
        setattr(config, key, value)
    return config


def saved(name, folder, **changes):
    """A folder with a model's shape, but two layers, the second one without RoPE if any is, and few tokens."""
    special = {"vocab_size": 512, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    config = shape(name, **special, **changes)
    if hasattr(config, "no_rope_layers"):
        config.no_rope_layers = [1, 0]
    config.save_pretrained(folder)
    return str(folder)


def part(name, *keys):
    found = yaml.safe_load((ROOT / "configs" / f"{name}.yaml").read_text())
    for key in keys:
        found = found.get(key, {})
    return found


def step(name, recipe, source, *, random_weights=True):
    """Take the first step of a recipe, and hold that gradients change what is trained: adapters alone, or all."""
    backbone = part(f"model/{name}", "model", "backbone") | part(f"trainer/{recipe}", "model", "backbone")
    backbone |= {"source": source, "random_weights": random_weights}
    if "lora" in backbone:
        backbone["lora"] = LoRA(**backbone["lora"])
    optimizer = part(f"trainer/{recipe}", "model", "optimizer", "init_args")
    task = LongContextQA(Backbone(**backbone), RULE, functools.partial(torch.optim.AdamW, weight_decay=0, **optimizer))
    example = {
        "id": "",
        "input_ids": [5 + number % 200 for number in range(TOKENS)],
        "prompt_length": TOKENS - 8,
        "gold_spans": [],
        "answer_spans": [],
        "answers": [""],
        "match": "any",
    }
    task.configure_model()
    trained = {key: weight for key, weight in task.model.named_parameters() if weight.requires_grad}
    before = {key: weight.detach().clone() for key, weight in trained.items()}
    precision = part(f"trainer/{recipe}", "trainer").get("precision")
    trainer = quiet_trainer(max_steps=1, gradient_clip_val=1.0, precision=precision)
    trainer.fit(task, DataLoader([example], collate_fn=functools.partial(collate, pad_token_id=2)))
    assert torch.isfinite(trainer.callback_metrics["train/loss"])
    assert all(weight.dtype == torch.float32 for weight in trained.values()), "bfloat16 would round small steps away"
    unchanged = {key for key, weight in trained.items() if weight.equal(before[key])}
    # An adapter's first factor has no gradient before the second one has left zero.
    assert unchanged == {key for key in trained if "lora_A" in key}
    assert any("lora_" in key for key in trained) == all("lora_" in key for key in trained) == (recipe != "full")


@pytest.fixture(autouse=True)
def room():
    """A trainer and its model hold one another; the next test's needs the memory."""
    yield
    gc.collect()


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_shape_has_as_many_weights_as_the_model(name):
    check_config(shape(name))
    with torch.device("meta"):
        one, two = (AutoModelForCausalLM.from_config(shape(name, layers)).num_parameters() for layers in (1, 2))
    layers = AutoConfig.from_pretrained(str(SHAPES / name)).num_hidden_layers
    assert one + (layers - 1) * (two - one) == PARAMETERS[name]


def test_each_model_has_a_shape_and_a_line_of_the_documentation():
    assert {path.stem for path in (ROOT / "configs" / "model").glob("*.yaml")} - {"smollm2", "tiny"} == set(PARAMETERS)
    assert {path.name for path in SHAPES.iterdir()} - {"smollm2-135m"} == set(PARAMETERS)
    assert set(table()) == set(PARAMETERS)


def table():
    """Of each model in the documentation its source and what it says for each size of GPU."""
    rows = re.findall(r"^\| \[([\w.-]+)\]\(../../configs/model/\1\.yaml\) \| (.*) \|$", MODELS.read_text(), re.M)
    return {name: cells.split(" | ") for name, cells in rows}


@pytest.mark.parametrize("name", PARAMETERS)
def test_the_table_names_what_leaves_a_third_of_a_gpu_to_activations(name):
    config, count = shape(name), PARAMETERS[name]
    tables = (1 if config.tie_word_embeddings else 2) * config.vocab_size * config.hidden_size
    # float32 weights, gradients and two moments; bfloat16 ones; 4 bits and the scales of scales of 64 weights.
    held = {"full": 16 * count, "LoRA": 2 * count, "QLoRA": 2 * tables + 0.516 * (count - tables)}
    expected = [next(how for how, size in held.items() if size <= gpu * 2 / 3) for gpu in GPUS]
    source, *found = table()[name]
    assert found == expected
    assert source == f"`{part(f'model/{name}', 'model', 'backbone', 'source')}`"
    command = (ROOT / "configs" / "model" / f"{name}.yaml").read_text().splitlines()[0]
    assert command.startswith(f"# lrsa fit --config configs/model/{name}.yaml ")
    assert f"configs/trainer/{expected[0].lower()}.yaml" in command, "the smallest GPU's"


@pytest.mark.parametrize("recipe", ["full", "lora"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_takes_a_step_at_a_small_width(name, recipe, tmp_path):
    step(name, recipe, saved(name, tmp_path, **SMALL))


def test_weights_of_four_bits_take_a_step(tmp_path):
    pytest.importorskip("bitsandbytes")
    folder = saved("qwen3-0.6b", tmp_path, **SMALL)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    step("qwen3-0.6b", "qlora", folder, random_weights=False)


@pytest.mark.slow
# The others have the classes of these or of those above; each takes ten seconds.
@pytest.mark.parametrize("name", ["qwen3-0.6b", "llama-3.2-3b", "olmo-2-7b"])
def test_two_layers_take_a_step_at_the_models_own_width(name, tmp_path):
    step(name, "full" if PARAMETERS[name] < 1.5e9 else "lora", saved(name, tmp_path))


WINDOWED = {
    # With the windows that their published configs have.
    "Gemma 2": ("Gemma2Config", {}),
    "Gemma 3": ("Gemma3TextConfig", {}),
    "Mistral 7B v0.1": ("MistralConfig", {"sliding_window": 4096}),
    "Phi-3 mini": ("Phi3Config", {"sliding_window": 2047}),
    "Phi-4 mini": ("Phi3Config", {"sliding_window": 262144}),
    "OLMo 3": ("Olmo3Config", {}),
    "gpt-oss": ("GptOssConfig", {}),
}


@pytest.mark.parametrize("name", WINDOWED)
def test_a_model_with_sliding_windows_is_refused_as_the_documentation_says(name):
    family, changes = WINDOWED[name]
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2, "num_hidden_layers": 2, "vocab_size": 64}
    config = getattr(transformers, family)(**SMALL | special | changes)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    with refused("model", reason="sliding-window"):
        enable(model, RULE)
    with refused("model", reason="sliding-window"):
        check_config(config)
    assert name in MODELS.read_text()
