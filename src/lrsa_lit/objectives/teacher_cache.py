"""A cache of a fixed teacher's most likely tokens in a training split, written once and read in every epoch.

The cache is a folder next to the prepared data, protected by the same checksums. For each position that predicts a
token, it holds the n most likely tokens, their log-probabilities, and the log-probability of all other tokens together.

Dimensions: P positions of the split that predict a token, n tokens, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from rich.progress import track

from lrsa_lit import verified
from lrsa_lit.data import token_cache
from lrsa_lit.data.collate import collate_training
from lrsa_lit.data.module import QADataModule
from lrsa_lit.errors import UserError
from lrsa_lit.models.backbone import uncompiled
from lrsa_lit.models.head import ROWS, Head
from lrsa_lit.objectives.distribution import Distribution
from lrsa_lit.objectives.positions import starts_of
from lrsa_lit.objectives.teachers import Loaded
from lrsa_lit.paths import cache_dir
from lrsa_lit.terminal import PlainConsole

Array = np.ndarray[Any, np.dtype[Any]]

_FACTS, _STARTS, _TOKENS, _LOGS = "facts.json", "starts.npy", "tokens.bin", "logs.bin"


class Kept:
    """A folder written by :func:`write`, opened with memory-mapped files.

    Attributes:
        width: V, the number of tokens that the distributions cover.
    """

    def __init__(self, folder: Path) -> None:
        facts = json.loads((folder / _FACTS).read_text(encoding="utf-8"))
        self.width = int(facts["width"])
        self._starts = np.load(folder / _STARTS)
        rows, n = int(self._starts[-1]), int(facts["n"])
        self._tokens = np.memmap(folder / _TOKENS, _dtype_of(self.width), "r", shape=(rows, n))
        self._logs = np.memmap(folder / _LOGS, np.float16, "r", shape=(rows, n + 1))

    def of(self, position: int, count: int) -> tuple[Array, Array]:
        """Tokens (count, n) and log-probabilities (count, n + 1) of the example at an index of the split.

        Raises:
            UserError: the cached example has another number of positions, so the cache is for other data.
        """
        start, end = self._starts[position : position + 2]
        if end - start != count:
            held = f"example {position} has {end - start} positions there instead of {count}"
            raise UserError("teacher", reason=f"is cached for other data: {held}")
        return self._tokens[start:end], self._logs[start:end]


class MadeUp:
    """Made-up values for any example, to measure training steps."""

    def __init__(self, n: int, width: int) -> None:
        self.width = width
        self._tokens, self._logs = np.zeros((1, n), _dtype_of(width)), np.full((1, n + 1), -1.0, np.float16)

    def of(self, position: int, count: int) -> tuple[Array, Array]:
        """Values in the shapes of :meth:`Kept.of`."""
        return self._tokens.repeat(count, axis=0), self._logs.repeat(count, axis=0)


@dataclass(frozen=True)
class Place:
    """Where a teacher's values for a training split are cached; the folder depends on all that determines the values.

    Attributes:
        data: fingerprint of the training split.
        teacher: digest of the teacher model.
        temperature: the divisor of its logits.
        vocabulary: rows of the trained model's head; additional rows of the teacher's head are ignored.
    """

    data: str
    teacher: str
    temperature: float
    vocabulary: int

    @cached_property
    def _key(self) -> str:
        parts = json.dumps([self.teacher, self.temperature, self.vocabulary])
        return hashlib.sha256(parts.encode()).hexdigest()[:16]

    def folder(self, n: int) -> Path:
        """The folder with n tokens per position."""
        return cache_dir("data", self.data, "teachers", f"{self._key}-{n}")

    def open(self, n: int) -> Kept:
        """Open a cache with at least n tokens per position.

        Raises:
            UserError: there is none, or its files are damaged.
        """
        kept = sorted(int(path.name.rpartition("-")[2]) for path in self.folder(n).parent.glob(f"{self._key}-*"))
        enough = [count for count in kept if count >= n]
        if not enough:
            raise self._missing(n, kept)
        folder = self.folder(enough[0])
        if damage := verified.damage(folder):
            raise UserError("teacher", folder, reason=f"is a damaged cache ({damage})")
        return Kept(folder)

    def _missing(self, n: int, kept: Sequence[int]) -> UserError:
        """The error for a missing cache, which names what is cached instead."""
        if kept:
            return UserError("top_n", n, f"at most {kept[-1]}, the number of tokens cached per position")
        found = [json.loads(path.read_text()) for path in cache_dir("data").glob(f"*/teachers/*/{_FACTS}")]
        own = [facts for facts in found if facts["teacher"] == self.teacher]
        here = [facts for facts in own if facts["data"] == self.data]
        if at := [facts["temperature"] for facts in here if facts["vocabulary"] == self.vocabulary]:
            return UserError("temperature", self.temperature, f"{at[0]}, the temperature of the cached teacher")
        if here:
            reason = "is cached only for a model with another vocabulary size"
        elif own:
            reason = "is cached only for other data"
        elif any(facts["data"] == self.data for facts in found):
            reason = "is not the teacher that is cached for this data"
        else:
            reason = "is not cached"
        return UserError("teacher", reason=reason)


def write(
    place: Place,
    n: int,
    teacher: Loaded,
    data: QADataModule,
    device: torch.device,
    context: Callable[[], AbstractContextManager[Any]],
) -> Path:
    """Run a teacher once over a training split and store its n most likely tokens at each position.

    The folder is written completely or not at all. An existing folder is kept unless it is damaged.

    Args:
        place: where to write.
        n: tokens per position, at most the vocabulary.
        teacher: the teacher model.
        data: the data, whose training split must be prepared; ``batch_size`` examples run at a time.
        device: the device to run on.
        context: a context for the passes, such as the trainer's precision.

    Returns:
        The folder.
    """
    folder = place.folder(n)
    if folder.is_dir() and verified.damage(folder) is None:
        return folder
    examples = data.open_split("train")
    lengths = token_cache.lengths(examples)
    starts = np.cumsum([0, *(length - 1 for length in lengths)])

    def fill(partial: Path) -> None:
        np.save(partial / _STARTS, starts)
        with (partial / _TOKENS).open("wb") as tokens, (partial / _LOGS).open("wb") as logs, context(), uncompiled():
            for position, found in _taught(place, n, teacher, examples, lengths, data.batch_size, device):
                assert found.tokens is not None
                _put(tokens, int(starts[position]), found.tokens, _dtype_of(found.width))
                _put(logs, int(starts[position]), found.logs, np.dtype(np.float16))
                held = {"width": found.width, "n": found.tokens.shape[1]}
        facts = {**dataclasses.asdict(place), **held}
        (partial / _FACTS).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")

    with token_cache.writable(folder):
        verified.build(folder, fill)
    return folder


@torch.no_grad()
def _taught(
    place: Place,
    n: int,
    teacher: Loaded,
    examples: datasets.Dataset,
    lengths: Sequence[int],
    size: int,
    device: torch.device,
) -> Iterator[tuple[int, Distribution]]:
    """Each example's index and the distributions at all its tokens but the last; the longest examples come first."""
    order = sorted((at for at, length in enumerate(lengths) if length > 1), key=lambda at: -lengths[at])
    console, firsts = PlainConsole(stderr=True), range(0, len(order), size)
    for first in track(firsts, "Asking the teacher", console=console, transient=True, disable=not console.is_terminal):
        positions = order[first : first + size]
        # Padding is on the right and attention causal, so any token id will do.
        batch = collate_training(examples.__getitems__(positions), pad_token_id=0)
        batch["input_ids"] = batch["input_ids"].to(device)
        taught = teacher.run(None, batch, {"input_ids": batch["input_ids"], "use_cache": False}, ())
        # A loaded model always has a head.
        head = (taught.head or Head()).as_autocast()
        for position, start in zip(positions, starts_of(batch), strict=True):
            pieces = []
            for rows in taught.hidden[start : start + lengths[position] - 1].split(ROWS):
                logits = head.logits(rows)[:, : place.vocabulary] / place.temperature
                pieces.append(Distribution.most_likely(logits, min(n, logits.shape[1])))
            tokens, logs = (torch.cat([getattr(each, name) for each in pieces]) for name in ("tokens", "logs"))
            yield position, Distribution(logs, pieces[0].width, tokens)


def _put(file: Any, row: int, values: torch.Tensor, dtype: np.dtype[Any]) -> None:
    file.seek(row * values.shape[1] * dtype.itemsize)
    file.write(values.cpu().numpy().astype(dtype).tobytes())


def _dtype_of(width: int) -> np.dtype[Any]:
    """The smallest dtype for token ids that PyTorch can read."""
    return np.dtype(np.uint16 if width <= 1 << 16 else np.int32)
