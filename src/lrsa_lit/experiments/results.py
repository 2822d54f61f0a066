"""Results as JSON lines: each is on the disk before the next one is begun."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

from lrsa_lit.errors import UserError
from lrsa_lit.experiments.study import Study
from lrsa_lit.paths import check_writable

Line = dict[str, Any]

_TRAINED = ("config", "seed", "train_digest")
"""What a training depends on. On a GPU another one of the same need not give the same bits."""

_BEGINNING = b'{"kind": "'
"""Of each line."""

_KEYS = {
    "training": (*_TRAINED, "weights"),
    "evaluation": (*_TRAINED, "weights", "rule_digest", "set", "split", "set_digest", "generated"),
}

_ABOUT = ("study", "row", *_TRAINED, "machine")
_FIELDS = {
    "training": (*_ABOUT, "steps", "loss_of_last_20_steps", "tokens_per_second", "peak_memory_bytes", "settings"),
    "evaluation": (*_ABOUT, "attention", "rule_digest", "rule", "layers", "kv_share", "set", "split", "set_digest",
                   "questions", "loss", "tokens", "f1", "em", "recall", "text"),
}  # fmt: skip
"""What a report reads of each line; the rest, such as the weights, lines did not always say."""


class Results:
    """A file of results.

    Args:
        path: the file; it need not exist.
        study: the study that it must be of.

    Raises:
        UserError: a line of it is no result, or all are another study's. One that was cut off at the end is dropped
            when another is written.
    """

    def __init__(self, path: Path, study: Study) -> None:
        self.path = path
        self.lines = read_lines(path)
        known = {row.hash for row in study.rows.values()}
        if self.lines and not any(line["study"] == study.title or line["config"] in known for line in self.lines):
            raise UserError("--out", str(path), f"a file of {study.title}", reason=f"is of {self.lines[0]['study']!r}")
        self._known = {key_of(line) for line in self.lines}
        self._weights = _last_weights(self.lines)

    def weights_of(self, **values: Any) -> str | None:
        """Digest of the last weights of a config, seed and training data; None where they were not trained."""
        return self._weights.get(tuple(values[name] for name in _TRAINED))

    def has(self, **values: Any) -> bool:
        """Whether there is a line of these values, as :func:`key_of` takes them."""
        return key_of(values) in self._known

    def check_writable(self) -> None:
        """Refuse, before there is a result, a file that cannot be written."""
        check_writable("--out", self.path, self.path.absolute().parent)
        if self.path.exists() and not os.access(self.path, os.W_OK):
            raise UserError("--out", self.path, reason="cannot be written (it is read-only)")

    def append(self, line: Line) -> None:
        """Write a line, and wait until it is on the disk.

        Raises:
            UserError: it cannot be written.
        """
        text = json.dumps(line, ensure_ascii=False) + "\n"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self.path.exists():
                _end_last_line(self.path)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise UserError("--out", self.path, reason=f"cannot be written ({error.strerror})") from error
        self.lines.append(line)
        self._known.add(key_of(line))
        self._weights |= _last_weights([line])


def key_of(line: Line) -> tuple[Hashable, ...]:
    """What makes a result another one."""
    return (line["kind"], *(line[name] for name in _KEYS[line["kind"]]))


def read_lines(path: Path) -> list[Line]:
    """The results of a file, the last one of each key.

    Raises:
        UserError: a line is no result, or not all of one; a last one that was cut off is passed over.
    """
    if not path.exists():
        return []
    found: dict[tuple[Hashable, ...], Line] = {}
    try:
        *texts, last = path.read_bytes().split(b"\n")
    except OSError as error:
        raise UserError(str(path), reason=f"it cannot be read ({error.strerror})") from None
    if not _is_cut_off(last):
        texts.append(last)
    for number, text in enumerate(texts, start=1):
        try:
            line = json.loads(text)
            if lacking := [name for name in _FIELDS[line["kind"]] if name not in line]:
                raise UserError(
                    f"{path}, line {number}", reason=f"it lacks {lacking[0]!r}, which each {line['kind']} has"
                )
            if line["kind"] == "evaluation":
                # Lines from before losses could be asked for alone do not say it.
                line.setdefault("generated", bool(line["text"]))
            # Nor did lines always say of which weights they are.
            line.setdefault("weights", "")
            found[key_of(line)] = line
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError):
            raise UserError(f"{path}, line {number}", reason="it is no result of a study") from None
    return list(found.values())


def current(lines: Sequence[Line]) -> list[Line]:
    """Without what was found with weights that were trained anew since, as they had been lost."""
    last = _last_weights(lines)
    return [line for line in lines if line["weights"] == last.get(_trained(line), line["weights"])]


def _last_weights(lines: Sequence[Line]) -> dict[tuple[Hashable, ...], str]:
    return {_trained(line): line["weights"] for line in lines if line["kind"] == "training"}


def _trained(line: Line) -> tuple[Hashable, ...]:
    return tuple(line[name] for name in _TRAINED)


def _is_cut_off(last: bytes) -> bool:
    """Whether what follows the last line's end is the beginning of a result, or nothing.

    A whole result without its end, as some editors leave it, is none; nor is what was never a result.
    """
    with contextlib.suppress(json.JSONDecodeError, UnicodeDecodeError):
        json.loads(last)
        return False
    return last[: len(_BEGINNING)] == _BEGINNING[: len(last)]


def _end_last_line(path: Path) -> None:
    """Remove what a process that was killed has left of its last line; end one that is whole."""
    with path.open("rb+") as file:
        content = file.read()
        whole = content.rfind(b"\n") + 1
        if _is_cut_off(content[whole:]):
            file.truncate(whole)
        else:
            file.write(b"\n")
