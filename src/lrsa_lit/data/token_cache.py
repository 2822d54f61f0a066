"""Tokenised examples on disk: one folder per split, written once and atomically, and verified when it is opened."""

from __future__ import annotations

import atexit
import contextlib
import json
import logging
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import datasets
import pyarrow.compute
from datasets.arrow_writer import ArrowWriter

from lrsa_lit import io, verified
from lrsa_lit.data.collate import ExampleSize, learnt_spans
from lrsa_lit.data.prompts import Example
from lrsa_lit.errors import UserError

_log = logging.getLogger("lrsa_lit.data")
_EXAMPLES, _REPORT = "examples.arrow", "report.json"
_TEXT, _INT = datasets.Value("string"), datasets.Value("int32")
_FEATURES = datasets.Features(
    {
        "id": _TEXT,
        "input_ids": datasets.List(_INT),
        "prompt_length": _INT,
        "context_length": _INT,
        "first_turn": _INT,
        "context_span": datasets.List(_INT),
        "source_length": _INT,
        "learnt": datasets.List(datasets.List(_INT)),
        "rejected": datasets.List(_INT),
        "gold_spans": datasets.List(datasets.List(_INT)),
        "answer_spans": datasets.List(datasets.List(_INT)),
        "answers": datasets.List(_TEXT),
        "match": _TEXT,
        "task": _TEXT,
        "question": _TEXT,
        "subject": _TEXT,
    }
)


def is_built(folder: Path) -> bool:
    """Whether the folder holds a finished, undamaged split; unfinished splits are written under another name."""
    return folder.is_dir() and verified.damage(folder) is None


def build(folder: Path, examples: Iterable[Example], report: Counter[str]) -> None:
    """Write a split to a temporary folder, and rename it to ``folder`` once it is complete and on the disk.

    A damaged split in ``folder`` is replaced. Examples are consumed one by one, so memory does not grow with the split.
    ``report`` is stored after the last example, because the iterator fills it.

    Raises:
        UserError: the cache cannot be written.
    """
    if folder.is_dir() and (damage := verified.damage(folder)):
        _log.warning("%s is damaged (%s) and will be rebuilt", folder, damage)

    def fill(partial: Path) -> None:
        with ArrowWriter(path=str(partial / _EXAMPLES), features=_FEATURES, writer_batch_size=256) as writer:
            for example in _apart(examples):
                prompt = example["prompt_length"]
                learnt = {"learnt": learnt_spans(example), "first_turn": prompt, "source_length": prompt}
                texts = {"task": "", "question": "", "subject": ""}
                whole = {**texts, "rejected": [], "context_span": [], **learnt, **example}
                writer.write({"context_length": whole["first_turn"], **whole})
            writer.finalize()
        (partial / _REPORT).write_text(json.dumps(report, indent=2) + "\n")

    try:
        with writable(folder):
            verified.build(folder, fill)
    except _SourceError as error:
        raise error.args[0] from None


def load(folder: Path) -> tuple[datasets.Dataset, Counter[str]]:
    """Open a finished split, memory-mapped, with its report.

    Raises:
        UserError: the split has been damaged since it was built.
    """
    if damage := verified.damage(folder):
        raise UserError("LRSA_CACHE_DIR", folder, reason=f"is damaged ({damage}); remove it to have it rebuilt")
    return datasets.Dataset.from_file(str(folder / _EXAMPLES)), Counter(json.loads((folder / _REPORT).read_text()))


def remove_abandoned(root: Path) -> None:
    """Remove what killed builds left behind, under all keys: a key may never be requested again."""
    # A leftover that cannot be removed does no harm.
    with contextlib.suppress(OSError):
        for key in root.iterdir():
            if key.is_dir():
                io.remove_abandoned(key)


def forget_at_exit(folder: Path) -> None:
    """Remove a folder when this process ends."""
    process = os.getpid()

    def forget() -> None:
        # Forked processes run this handler as well, but must not remove the folder.
        if os.getpid() == process:
            shutil.rmtree(folder, ignore_errors=True)

    atexit.register(forget)


def lengths(examples: datasets.Dataset) -> list[int]:
    """Tokens of each example, without reading the tokens themselves."""
    return _counts(examples, "input_ids")


def longest(examples: datasets.Dataset) -> list[int]:
    """Tokens of each example's longest training sequence: the example, or its prompt with the rejected answer."""
    columns = lengths(examples), examples["prompt_length"], _counts(examples, "rejected")
    return [max(own, prompt + rejected) if rejected else own for own, prompt, rejected in zip(*columns, strict=True)]


def sizes(examples: datasets.Dataset) -> list[ExampleSize]:
    """The size of each example, without reading the tokens themselves."""
    learnt, contexts = (examples.data.column(name).to_pylist() for name in ("learnt", "context_span"))
    return list(map(ExampleSize.learning, lengths(examples), learnt, _counts(examples, "rejected"), contexts))


def _counts(examples: datasets.Dataset, name: str) -> list[int]:
    return [int(count) for count in pyarrow.compute.list_value_length(examples.data.column(name)).to_pylist()]


@contextlib.contextmanager
def writable(path: Path) -> Iterator[None]:
    """Turn an OSError while writing to the cache into a one-line UserError."""
    try:
        yield
    except OSError as error:
        reason, hint = f"cannot write {path} ({error.strerror or error})", "set it to a folder that has room"
        raise UserError("LRSA_CACHE_DIR", reason=reason, hint=hint) from None


class _SourceError(Exception):
    """Carries an OSError from the examples' iterator past the handler of the cache's own OSErrors."""


def _apart(examples: Iterable[Example]) -> Iterator[Example]:
    try:
        yield from examples
    except OSError as error:
        raise _SourceError(error) from error
