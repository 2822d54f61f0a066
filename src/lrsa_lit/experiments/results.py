"""Results as JSON lines: each line is on the disk before the next job starts."""

from __future__ import annotations

import contextlib
import json
import os
import statistics
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lrsa_lit.errors import UserError
from lrsa_lit.experiments.study import Evaluation, Settings, Study, digest
from lrsa_lit.paths import check_writable

Line = dict[str, Any]

_TRAINED = ("config", "seed", "train_digest")
"""Fields that identify a training. On a GPU, repeating a training need not give identical weights."""

_BEGINNING = b'{"kind": "'
"""The beginning of each line."""

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
"""Fields of each line that a report needs; older lines may lack others, such as the weights."""


class Results:
    """The results file of a study, which need not exist yet; an incomplete last line is dropped.

    Raises:
        UserError: a line is not a result, or all lines belong to another study. Methods also raise it if the file
            cannot be written.
    """

    def __init__(self, path: Path, study: Study) -> None:
        self.path = path
        self.lines = read_lines(path)
        known = {row.hash for row in study.rows.values()}
        if self.lines and not any(line["study"] == study.title or line["config"] in known for line in self.lines):
            raise UserError("--out", str(path), f"a file of {study.title}", reason=f"is of {self.lines[0]['study']!r}")
        self._known = {_key_of(line): line.get("max_new_tokens") for line in self.lines}
        self._weights = _last_weights(self.lines)

    def weights_of(self, trained: Line) -> str | None:
        """Digest of the latest weights of a config, seed and training data; None if they were not trained."""
        return self._weights.get(_trained(trained))

    def has(self, trained: Line, item: Evaluation, set_digest: str, new_tokens: int) -> bool:
        """Whether the results hold an evaluation of the latest weights; one with answers also has the losses.

        Answers generated with another ``max_new_tokens`` than ``new_tokens`` do not count. If ``new_tokens`` is 0 (the
        default length), or an older line does not state it, any length counts.
        """
        asked = {"kind": "evaluation", **trained, "weights": self.weights_of(trained) or "", **_asked(item)}
        asked["set_digest"] = set_digest
        answered = _key_of({**asked, "generated": True})
        if not item.generates:
            return answered in self._known or _key_of({**asked, "generated": False}) in self._known
        return answered in self._known and (not new_tokens or self._known[answered] in (None, new_tokens))

    def check_writable(self) -> None:
        """Raise a UserError if the file cannot be written, before there are results to lose."""
        check_writable("--out", self.path, self.path.absolute().parent)
        if self.path.exists() and not os.access(self.path, os.W_OK):
            raise UserError("--out", self.path, reason="cannot be written (it is read-only)")

    def append(self, line: Line) -> None:
        """Append a line and sync it to disk."""
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
        self._known[_key_of(line)] = line.get("max_new_tokens")
        self._weights |= _last_weights([line])


def training_line(about: Line, found: Settings, settings: Settings) -> Line:
    """The line of a training, from the fit's record ``found``; ``about`` identifies the study and row."""
    return {
        "kind": "training",
        **about,
        "machine": found["machine"],
        "weights": found["weights"],
        "steps": settings["trainer"]["max_steps"],
        "loss_of_last_20_steps": statistics.fmean(found["losses"][-20:]),
        **{name: found[name] for name in ("tokens_per_second", "peak_memory_bytes", "seconds")},
        "losses": _rounded(found["losses"]),
        "settings": settings,
    }


def evaluation_lines(about: Line, weights: str, items: Sequence[Evaluation], path: Path) -> list[Line]:
    """One line per attention that a command has evaluated; ``path`` is its file of answers."""
    found = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    answers = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    (part,) = found["data_sets"].values()
    names = {rule["rule_digest"]: name for name, rule in reversed(found["attentions"].items())}
    lines = []
    for item in items:
        name = names[item.rule_digest]
        own = [line[name] for line in answers]
        scored = own if item.generates else []
        lines.append(
            {
                "kind": "evaluation",
                **about,
                "machine": found["machine"],
                "weights": weights,
                "attention": item.name,
                "rule": item.rule and item.rule.to_dict(),
                "layers": found["layers"],
                "length": part["length"],
                "kv_share": part["kv_share"][name],
                **_asked(item),
                "set_digest": part["set_digest"],
                "questions": part["questions"],
                "contexts": part["contexts"],
                "ids_digest": digest([line.get("id") for line in answers]),
                "dtype": found["dtype"],
                "generated": item.generates,
                "max_new_tokens": found["max_new_tokens"] if item.generates else None,
                "loss": _rounded([each["loss"] for each in own]),
                "tokens": [line["answer_tokens"] for line in answers],
                "f1": _rounded([each["f1"] for each in scored]),
                "em": [int(each["exact_match"]) for each in scored],
                "recall": _rounded([each["recall"] for each in scored]),
                "text": [each["prediction"] for each in scored],
                "survival": (found.get("survival", {}).get(name) or {}).get(""),
                "measured": found.get("measured", {}).get(name),
                "seconds": round(found["seconds"] / len(found["attentions"]), 1),
            }
        )
    return lines


def read_lines(path: Path) -> list[Line]:
    """Read the results of a file, the last line of each key; an incomplete last line is skipped.

    Raises:
        UserError: a line is not a result, or the file cannot be read.
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
        where = f"{path}, line {number}"
        try:
            line = json.loads(text)
            if lacking := [name for name in _FIELDS[line["kind"]] if name not in line]:
                raise UserError(where, reason=f"it lacks {lacking[0]!r}, which each {line['kind']} has")
            if line["kind"] == "evaluation":
                # Lines written before evaluations could be losses only lack this field.
                line.setdefault("generated", bool(line["text"]))
            # Old lines also lack the weights.
            line.setdefault("weights", "")
            found[_key_of(line)] = line
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError):
            raise UserError(where, reason="it is not a result of a study") from None
    return list(found.values())


def current(lines: Sequence[Line]) -> list[Line]:
    """Drop results of weights that were lost and have been trained again since."""
    last = _last_weights(lines)
    return [line for line in lines if line["weights"] == last.get(_trained(line), line["weights"])]


def _asked(item: Evaluation) -> Line:
    return {"rule_digest": item.rule_digest, "set": item.data_set, "split": item.split}


def _key_of(line: Mapping[str, Any]) -> tuple[Hashable, ...]:
    """The key that identifies a result."""
    return (line["kind"], *(line[name] for name in _KEYS[line["kind"]]))


def _last_weights(lines: Sequence[Line]) -> dict[tuple[Hashable, ...], str]:
    return {_trained(line): line["weights"] for line in lines if line["kind"] == "training"}


def _trained(line: Line) -> tuple[Hashable, ...]:
    return tuple(line[name] for name in _TRAINED)


def _rounded(values: Sequence[float]) -> list[float]:
    return [round(value, 4) for value in values]


def _is_cut_off(last: bytes) -> bool:
    """Whether the text after the last line end is the beginning of a result, or empty.

    False for a complete result without a line end, as some editors leave it, and for other text.
    """
    with contextlib.suppress(json.JSONDecodeError, UnicodeDecodeError):
        json.loads(last)
        return False
    return last[: len(_BEGINNING)] == _BEGINNING[: len(last)]


def _end_last_line(path: Path) -> None:
    """Remove an incomplete last line that a killed process left; add the line end to a complete one."""
    with path.open("rb+") as file:
        content = file.read()
        whole = content.rfind(b"\n") + 1
        if _is_cut_off(content[whole:]):
            file.truncate(whole)
        else:
            file.write(b"\n")
