"""Tokenised examples as one compressed file for each split, read with NumPy alone."""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import zipfile
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import numpy as np

from lrsa_lit.data.prompts import Example
from lrsa_lit.errors import UserError
from lrsa_lit.io import write_atomically

_QUESTION = 160
"""Tokens at the end of a prompt that may be its instruction and question."""

_FIELDS = ("id", "prompt_length", "gold_spans", "answer_spans", "answers", "match")


@dataclass(frozen=True)
class TokenFile:
    """The examples of a split.

    Attributes:
        examples: in their fixed order.
        digest: twelve hex digits of all of them.
    """

    examples: list[Example]
    digest: str

    @property
    def lengths(self) -> list[int]:
        """Tokens of each example."""
        return [len(example["input_ids"]) for example in self.examples]

    @property
    def by_length(self) -> list[int]:
        """The positions of the examples in the order of the lengths of their prompts."""
        return sorted(range(len(self.examples)), key=lambda place: self.examples[place]["prompt_length"])

    @functools.cached_property
    def contexts(self) -> list[int]:
        """For each example the number of its context, from 0 on.

        Those of one differ in the question alone, or have the same subject.
        """
        firsts: list[Example] = []
        found: list[int] = []
        for example in self.examples:
            number = next((n for n, first in enumerate(firsts) if _same_context(first, example)), len(firsts))
            if number == len(firsts):
                firsts.append(example)
            found.append(number)
        return found


def path_of(folder: Path, data_set: str, split: str) -> Path:
    """Where a split of a data set lies."""
    return folder / f"{data_set}-{split}.npz"


def write(path: Path, examples: Iterable[Example]) -> TokenFile:
    """Write examples, as uint16 tokens; the file appears only when it is complete.

    Raises:
        UserError: there is no example, or a token beyond 65,535.
    """
    kept = list(examples)
    if not kept:
        raise UserError(f"{path.name}: there are no examples")
    tokens = [np.asarray(example["input_ids"], dtype=np.int64) for example in kept]
    flat = np.concatenate(tokens)
    if flat.max() > np.iinfo(np.uint16).max:
        raise UserError(f"{path.name}: token {flat.max()} is not allowed; a token file holds tokens up to 65535")
    about = json.dumps([_about(example) for example in kept], ensure_ascii=False)

    def fill(file: IO[bytes]) -> None:
        np.savez_compressed(
            file,
            tokens=flat.astype(np.uint16),
            lengths=np.asarray([len(ids) for ids in tokens], dtype=np.int32),
            about=np.frombuffer(about.encode(), dtype=np.uint8),
        )

    write_atomically(path, fill)
    return read(path)


def read(path: Path) -> TokenFile:
    """The examples of a file that :func:`write` has written.

    Raises:
        UserError: there is no such file, or it is broken.
    """
    try:
        with np.load(path) as arrays:
            flat, lengths, about = arrays["tokens"], arrays["lengths"], arrays["about"].tobytes()
        rows = json.loads(about)
        bounds = itertools.pairwise(np.concatenate([[0], lengths.cumsum()]).tolist())
        pairs = list(zip(rows, bounds, strict=True))
        examples = [cast("Example", {**row, "input_ids": flat[start:stop].tolist()}) for row, (start, stop) in pairs]
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; `lrsa study data` writes it") from None
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{path}: it is no file of `lrsa study data` ({error})") from None
    # Not of the file: its compression may differ from one library to the next.
    found = hashlib.sha256(flat.astype("<u2").tobytes() + lengths.astype("<i4").tobytes() + about).hexdigest()[:12]
    return TokenFile(examples, found)


def _same_context(one: Example, other: Example) -> bool:
    """Whether two prompts are the same but for their ends; short ones, of which little is compared, never are.

    Where they have subjects, these decide: of one article texts can be made that share much and begin otherwise.
    """
    if one.get("subject") or other.get("subject"):
        return one.get("subject") == other.get("subject")
    shared = min(one["prompt_length"], other["prompt_length"]) - _QUESTION
    # Without copies: two contexts differ early.
    tokens = zip(one["input_ids"], other["input_ids"], strict=False)
    return shared > _QUESTION and all(mine == its for mine, its in itertools.islice(tokens, shared))


def _about(example: Example) -> dict[str, Any]:
    found = {name: _plain(example, name) for name in _FIELDS}
    # Not in each: the digest of a file that has none stays what it was.
    return found | ({"subject": example["subject"]} if example.get("subject") else {})


def _plain(example: Example, name: str) -> Any:
    value: Any = example[name]  # type: ignore[literal-required]
    if name.endswith("_spans"):
        return [[int(start), int(end)] for start, end in value]
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else value
