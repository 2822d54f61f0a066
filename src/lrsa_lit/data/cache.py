"""Tokenised examples on disk: one folder a split, written once, whole or not at all."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import uuid
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import datasets
import pyarrow.compute
from datasets.arrow_writer import ArrowWriter

from lrsa_lit.data.prompts import Example
from lrsa_lit.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Part of every key: raise it when prompts.py, or a data set's recipe, gives other examples for the same parameters.
CODE_VERSION = 3

_log = logging.getLogger("lrsa_lit.data")
_EXAMPLES, _REPORT = "examples.arrow", "report.json"
_INT = datasets.Value("int32")
_FEATURES = datasets.Features(
    {
        "id": datasets.Value("string"),
        "input_ids": datasets.List(_INT),
        "prompt_length": _INT,
        "gold_spans": datasets.List(datasets.List(_INT)),
        "answer_spans": datasets.List(datasets.List(_INT)),
        "answers": datasets.List(datasets.Value("string")),
        "match": datasets.Value("string"),
        "task": datasets.Value("string"),
        "subject": datasets.Value("string"),
    }
)


def digest(parts: Mapping[str, object]) -> str:
    """A key of 16 hex digits that is the same wherever the same JSON-able parts are given."""
    text = json.dumps({**parts, "code_version": CODE_VERSION}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of what decides a prompt's tokens: the fast tokenizer's definition, chat template and end token."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    # Both are leftovers of the last call with padding=… or truncation=…, not properties of the tokenizer.
    backend.pop("padding"), backend.pop("truncation")
    parts = [backend, tokenizer.chat_template, str(tokenizer.eos_token)]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def is_built(folder: Path) -> bool:
    """Whether the folder holds a finished split; an unfinished one never bears its name."""
    return folder.is_dir()


def build(folder: Path, examples: Iterable[Example], report: Counter[str]) -> None:
    """Write a split beside its place and rename it there once it is complete.

    Args:
        folder: where the split will lie.
        examples: consumed one by one, so that memory does not grow with the split.
        report: counts, stored after the last example; whoever yields the examples fills it.

    Raises:
        UserError: the cache cannot be written.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        # Not tempfile.mkdtemp: it would lock other users out of a shared cache.
        unfinished = folder.with_name(f".{folder.name}-{uuid.uuid4().hex}")
        unfinished.mkdir()
    except OSError as error:
        raise _unwritable(folder, error) from None
    try:
        _write(unfinished, examples)
        (unfinished / _REPORT).write_text(json.dumps(report, indent=2) + "\n")
        _publish(unfinished, folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def load(folder: Path) -> tuple[datasets.Dataset, Counter[str]]:
    """A finished split, memory-mapped, and its report."""
    return datasets.Dataset.from_file(str(folder / _EXAMPLES)), Counter(json.loads((folder / _REPORT).read_text()))


def lengths(examples: datasets.Dataset) -> list[int]:
    """Tokens of each example, without reading the tokens themselves."""
    column = examples.data.column("input_ids")
    return [int(length) for length in pyarrow.compute.list_value_length(column).to_pylist()]


def _write(folder: Path, examples: Iterable[Example]) -> None:
    with ArrowWriter(path=str(folder / _EXAMPLES), features=_FEATURES, writer_batch_size=256) as writer:
        for example in examples:
            try:
                writer.write({"task": "", "subject": "", **example})
            except OSError as error:
                raise _unwritable(folder, error) from None
        writer.finalize()


def _publish(unfinished: Path, folder: Path) -> None:
    try:
        os.replace(unfinished, folder)
    except OSError as error:
        if not is_built(folder):
            raise _unwritable(folder, error) from None
        _log.info("%s was finished by another process meanwhile; using that", folder)


def _unwritable(folder: Path, error: OSError) -> UserError:
    return UserError(
        f"LRSA_CACHE_DIR: cannot write {folder} ({error.strerror or error}); "
        "set it to a folder that can be written and has room"
    )
