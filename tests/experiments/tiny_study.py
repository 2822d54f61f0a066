"""A study over a tiny model, in a folder of its own."""

import json
from pathlib import Path
from typing import Any

import yaml
from tokenizers import Tokenizer
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from lrsa_lit.models.tiny import tiny_config, tiny_tokenizer

VOCABULARY = 66_000


def _files(**splits: str | None) -> dict[str, Any]:
    folder = Path(__file__).with_name("questions")
    paths = {split: None if name is None else str(folder / f"{name}.jsonl") for split, name in splits.items()}
    return {"class_path": "lrsa_lit.data.QAFiles", "init_args": {"max_tokens": 1024, **paths}}


def big_model(folder: Path) -> Path:
    """A tiny random model whose tokens are the last ones of a vocabulary that 16 bits cannot count."""
    small = tiny_tokenizer()
    content = json.loads(small.backend_tokenizer.to_str())
    shift = VOCABULARY - len(small)
    content["model"]["vocab"] = {token: number + shift for token, number in content["model"]["vocab"].items()}
    for token in content["added_tokens"]:
        token["id"] += shift
    names = {name: getattr(small, name) for name in ("unk_token", "bos_token", "eos_token", "pad_token")}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(content)), chat_template=small.chat_template, **names
    )
    tokenizer.save_pretrained(folder)
    config = tiny_config(hidden_size=32, num_heads=2, num_kv_heads=1)
    config.vocab_size, config.bos_token_id = VOCABULARY, tokenizer.bos_token_id
    config.eos_token_id = config.pad_token_id = tokenizer.eos_token_id
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


STUDY: dict[str, Any] = {
    "seeds": [0, 1],
    "trainer": {"max_steps": 3, "accelerator": "cpu"},
    "model": {
        "backbone": {"source": "tiny"},
        "lrsa": {"sink_size": 2, "lag_size": 32, "top_k": 8},
        "max_new_tokens": 4,
    },
    "data": {
        "class_path": "lrsa_lit.data.Mixture",
        "init_args": {"max_tokens": 1024, "batch_size": 2, "weights": {"plain": 1.0}},
    },
    "data_sets": {
        "plain": _files(train="train", test="test"),
        "text": _files(train=None, test="text") | {"generate": False},
    },
    "inference": {
        "dense": None,
        "4x": {},
        "8x": {"top_k": 4},
        "random-4x": {"compressor": {"class_path": "lrsa_lit.ops.sparse_attention.RandomTokens"}},
    },
    "rows": {
        "base": {"trainer": {"max_steps": 0}},
        "dense": {"model": {"train_attention": None}},
        "lrsa": None,
        "mixed": {
            "model": {"train_top_k": {"class_path": "lrsa_lit.tasks.SampledTopK", "init_args": {"choices": [4, 8, 32]}}}
        },
    },
    "parts": {
        "main": {"rows": ["dense", "lrsa"], "seeds": [0], "inference": ["dense", "4x"], "sets": ["plain", "text"]},
        "all": {
            "rows": ["base", "mixed", "lrsa"],
            "inference": ["own", "random-4x"],
            "sets": ["plain"],
            "against": {"row": "lrsa", "inference": "own"},
        },
    },
    "bars": {
        "at 4x": {"set": "plain", "kept": 0.25, "of_dense": 0.5},
        "dense": {"set": "plain", "row": ["dense"], "inference": "dense", "at_least": 0.9},
        "pays": {
            "set": "plain",
            "row": "lrsa",
            "inference": "4x",
            "above": [["dense", "4x"], ["dense", "8x"]],
            "p": 0.01,
        },
    },
}
RESULTS = Path(__file__).with_name("tiny-results.jsonl")
"""Of both parts of the study, as runs on a CPU have given them."""


def write(path: Path, **changes: Any) -> Path:
    """A file of the study, some of whose keys are others; other parts need not have the rows of its bars."""
    changes = {"bars": {}} | changes if "parts" in changes else changes
    path.write_text(yaml.safe_dump({**STUDY, **changes}, sort_keys=False))
    return path


def merged(below: Any, above: Any) -> Any:
    """Mappings key by key, anything else by the upper one."""
    if not isinstance(below, dict) or not isinstance(above, dict):
        return above
    return below | {key: merged(below.get(key), value) for key, value in above.items()}
