"""Identify a model by the contents of its files, without loading it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

from lrsa_lit.io import sha256_of
from lrsa_lit.models.backbone import TINY, Backbone
from lrsa_lit.models.checkpoint import Trained
from lrsa_lit.paths import expanded

_WEIGHTS = (".ckpt", ".distcp", ".pt", ".safetensors", ".bin")
_CONFIGS = ("config.json", "adapter_config.json")
_OF_TRAINING = ("gradient_checkpointing", "compile_layers", "trust_remote_code")


def digest_of(source: str, trained: Trained) -> str:
    """SHA-256 of everything that determines a model's logits: the contents of its files, and its settings.

    Args:
        source: a checkpoint, a folder or a hub name.
        trained: the result of :func:`~lrsa_lit.models.sources.trained_model` for it.
    """
    backbone = trained.backbone
    settings = dataclasses.asdict(backbone)
    for name in ("source", "sha256", *_OF_TRAINING):
        del settings[name]
    if backbone.low_rank is not None:
        # Trained factors no longer depend on the file of moments.
        file = backbone.low_rank.moments_file() if trained.weights is None else None
        settings["low_rank"] |= {"whitening": None if file is None else sha256_of(file), "sha256": None}
    parts: list[Any] = [settings]
    if trained.weights is not None or backbone.lora is not None:
        parts.append(_of_path(expanded("model", source)))
    if trained.weights is None or backbone.lora is not None:
        parts.append(_of_base(backbone))
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def base_digest(backbone: Backbone) -> str:
    """SHA-256 of the contents of the base LLM's files, independent of the dtype it is loaded in."""
    parts = ["random", backbone.source] if backbone.random_weights else _of_base(backbone)
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _of_base(backbone: Backbone) -> Any:
    if backbone.source == TINY:
        return TINY
    folder = Path(backbone.location)
    # A hub commit identifies the contents of the files.
    commit = getattr(backbone.config, "_commit_hash", None)
    return _of_path(folder) if folder.is_dir() else [backbone.location, commit]


def _of_path(path: Path) -> Any:
    """The digest of a file, or the digests of a folder's weights and configs."""
    if path.is_file():
        return sha256_of(path)
    files = (file for file in sorted(path.rglob("*")) if file.suffix in _WEIGHTS or file.name in _CONFIGS)
    return {file.relative_to(path).as_posix(): sha256_of(file) for file in files if file.is_file()}
