"""What a fixed teacher holds most likely at each position of a training split, written once and read in every epoch.

It lies beside the prepared data, in a folder that is sealed as that is: for each position that predicts a token the n
most likely tokens, the logarithms of their probabilities, and that of all other tokens together.

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
    """An open folder of :func:`write`, memory-mapped.

    Attributes:
        width: V, the tokens that the distributions are over.
    """

    def __init__(self, folder: Path) -> None:
        facts = json.loads((folder / _FACTS).read_text(encoding="utf-8"))
        self.width = int(facts["width"])
        self._starts = np.load(folder / _STARTS)
        rows, n = int(self._starts[-1]), int(facts["n"])
        self._tokens = np.memmap(folder / _TOKENS, _dtype_of(self.width), "r", shape=(rows, n))
        self._logs = np.memmap(folder / _LOGS, np.float16, "r", shape=(rows, n + 1))

    def of(self, position: int, count: int) -> tuple[Array, Array]:
        """Tokens (count, n) and logarithms (count, n + 1) of the example at a position of the split.

        Raises:
            UserError: the example has not so many positions that predict a token, so it is of other data.
        """
        start, end = self._starts[position : position + 2]
        if end - start != count:
            held = f"example {position} has {end - start} positions there and not {count}"
            raise UserError("teacher", reason=f"is cached for other data: {held}")
        return self._tokens[start:end], self._logs[start:end]


class MadeUp:
    """Any values for any example, to measure steps with."""

    def __init__(self, n: int, width: int) -> None:
        self.width = width
        self._tokens, self._logs = np.zeros((1, n), _dtype_of(width)), np.full((1, n + 1), -1.0, np.float16)

    def of(self, position: int, count: int) -> tuple[Array, Array]:
        """As :meth:`Kept.of`."""
        return self._tokens.repeat(count, axis=0), self._logs.repeat(count, axis=0)


@dataclass(frozen=True)
class Place:
    """Where a teacher's values for a training split lie, by what decides them; how many tokens apart.

    Attributes:
        data: fingerprint of the training split.
        teacher: digest of the model.
        temperature: that its logits are divided by.
        vocabulary: rows of the trained model's head; those that the teacher's has beyond them are left out.
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
        """That of n tokens a position."""
        return cache_dir("data", self.data, "teachers", f"{self._key}-{n}")

    def open(self, n: int) -> Kept:
        """The values of n tokens a position or more.

        Raises:
            UserError: there are none, or they have been damaged since they were written.
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
        """What there is instead."""
        if kept:
            return UserError("top_n", n, f"at most {kept[-1]}, the tokens of a position that are cached")
        found = [json.loads(path.read_text()) for path in cache_dir("data").glob(f"*/teachers/*/{_FACTS}")]
        own = [facts for facts in found if facts["teacher"] == self.teacher]
        here = [facts for facts in own if facts["data"] == self.data]
        if at := [facts["temperature"] for facts in here if facts["vocabulary"] == self.vocabulary]:
            return UserError("temperature", self.temperature, f"{at[0]}, at which the teacher is cached")
        if here:
            reason = "is cached for a model with another size of vocabulary"
        elif own:
            reason = "is cached for other data alone"
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
    """Run a teacher once over a training split and keep its n most likely tokens at each position.

    The folder appears whole or not at all. One that is there already is left alone, unless it is damaged.

    Args:
        place: of the values.
        n: at most the vocabulary.
        teacher: the model.
        data: its training split is prepared; ``batch_size`` examples are run at a time.
        device: to run on.
        context: of the passes, such as the trainer's precision.

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
    """Each example's position and the distributions at all of its tokens but the last, the longest examples first."""
    order = sorted((at for at, length in enumerate(lengths) if length > 1), key=lambda at: -lengths[at])
    console, firsts = PlainConsole(stderr=True), range(0, len(order), size)
    for first in track(firsts, "Asking the teacher", console=console, transient=True, disable=not console.is_terminal):
        positions = order[first : first + size]
        # Pads stand behind the tokens, so it does not matter which token they are.
        batch = collate_training(examples.__getitems__(positions), pad_token_id=0)
        batch["input_ids"] = batch["input_ids"].to(device)
        taught = teacher.run(None, batch, {"input_ids": batch["input_ids"], "use_cache": False}, ())
        # A model that is loaded has a head of its own.
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
    """Of tokens; the smallest that PyTorch can be handed."""
    return np.dtype(np.uint16 if width <= 1 << 16 else np.int32)
