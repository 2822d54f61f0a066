"""Results as JSON lines: each is on the disk before the next one is begun."""

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
    """The results of a study in a file, which need not exist; a line that was cut off at its end is dropped.

    Raises:
        UserError: a line of it is no result, or all are another study's; later, that it cannot be written.
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
        """Digest of the last weights of a config, seed and training data; None where they were not trained."""
        return self._weights.get(_trained(trained))

    def has(self, trained: Line, item: Evaluation, set_digest: str, new_tokens: int) -> bool:
        """Whether an evaluation of the last weights is there; one with answers has the losses too.

        Answers that could be of another length than ``new_tokens`` are others, unless it is 0, for the default; older
        lines do not say how long.
        """
        asked = {"kind": "evaluation", **trained, "weights": self.weights_of(trained) or "", **_asked(item)}
        asked["set_digest"] = set_digest
        answered = _key_of({**asked, "generated": True})
        if not item.generates:
            return answered in self._known or _key_of({**asked, "generated": False}) in self._known
        return answered in self._known and (not new_tokens or self._known[answered] in (None, new_tokens))

    def check_writable(self) -> None:
        """Refuse, before there is a result, a file that cannot be written."""
        check_writable("--out", self.path, self.path.absolute().parent)
        if self.path.exists() and not os.access(self.path, os.W_OK):
            raise UserError("--out", self.path, reason="cannot be written (it is read-only)")

    def append(self, line: Line) -> None:
        """Write a line, and wait until it is on the disk."""
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
    """The line of a training, of whose study and row ``about`` tells, by what the fit has recorded."""
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
    """A line for each attention that a command has evaluated, whose answers are at ``path``."""
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
    """The results of a file, the last one of each key; a UserError at a line that is none, but a last one cut off."""
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
                # Lines from before losses could be asked for alone do not say it.
                line.setdefault("generated", bool(line["text"]))
            # Nor did lines always say of which weights they are.
            line.setdefault("weights", "")
            found[_key_of(line)] = line
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError):
            raise UserError(where, reason="it is no result of a study") from None
    return list(found.values())


def current(lines: Sequence[Line]) -> list[Line]:
    """Without what was found with weights that were trained anew since, as they had been lost."""
    last = _last_weights(lines)
    return [line for line in lines if line["weights"] == last.get(_trained(line), line["weights"])]


def _asked(item: Evaluation) -> Line:
    return {"rule_digest": item.rule_digest, "set": item.data_set, "split": item.split}


def _key_of(line: Mapping[str, Any]) -> tuple[Hashable, ...]:
    """What makes a result another one."""
    return (line["kind"], *(line[name] for name in _KEYS[line["kind"]]))


def _last_weights(lines: Sequence[Line]) -> dict[tuple[Hashable, ...], str]:
    return {_trained(line): line["weights"] for line in lines if line["kind"] == "training"}


def _trained(line: Line) -> tuple[Hashable, ...]:
    return tuple(line[name] for name in _TRAINED)


def _rounded(values: Sequence[float]) -> list[float]:
    return [round(value, 4) for value in values]


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
