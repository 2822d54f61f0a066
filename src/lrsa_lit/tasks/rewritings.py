"""Generate and judge rewritings of passages, from which preference pairs are made."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from typing import Any

from lrsa_lit.data.extracts import extracts
from lrsa_lit.data.growing_file import GrowingFile
from lrsa_lit.data.preferences import Candidate, PreferencePair, preferred
from lrsa_lit.data.prompts import Prompt
from lrsa_lit.data.reading import blamed_on, check_shape
from lrsa_lit.data.records import QARecord
from lrsa_lit.tasks.preference_judge import PreferenceJudge
from lrsa_lit.tasks.summariser import Summariser

SAMPLES, TEMPERATURE = 4, 0.7
"""Number of sampled summaries per passage, and their temperature."""
_LINE = {
    "key": str,
    "title": str,
    "passage": str,
    "question": str,
    "candidates": [{"by": str, "text": str, "success": bool, "f1": float, "loss": float}],
}


class Rewritings:
    """Makes and judges rewritings of the supporting passages of questions; reuses those in a file.

    Args:
        writer: samples summaries.
        judge: answers the questions.
        by: digest of both models and their settings.
        kept: the file.

    Attributes:
        without: number of questions without a supporting passage.
        too_long: number of passages left out because the question does not fit into the judge.
    """

    def __init__(self, writer: Summariser, judge: PreferenceJudge, by: str, kept: GrowingFile) -> None:
        self._writer, self._judge, self._by, self._file = writer, judge, by, kept
        self._known = dict(_read(kept))
        self.without = self.too_long = 0

    def of(self, contexts: Iterable[tuple[QARecord, Prompt]]) -> Iterator[Mapping[str, Any]]:
        """A dict for each supporting passage of each question: key, title, passage, question, candidates."""
        for record, prompt in contexts:
            places = [n for n, passage in enumerate(record.passages) if passage.title in record.supporting_titles]
            self.without += not places
            for place in places:
                key = hashlib.sha256(repr((record, prompt, place, self._by)).encode()).hexdigest()
                if key not in self._known and (line := self._made(record, prompt, place)) is not None:
                    self._known[key] = {"key": key, **line}
                    self._file.add(self._known[key])
                if key in self._known:
                    yield self._known[key]

    def _made(self, record: QARecord, prompt: Prompt, place: int) -> dict[str, Any] | None:
        passage = record.passages[place]
        drawn = self._writer.drawn(passage.text, SAMPLES, TEMPERATURE, seed=passage.text)
        texts = {f"sample-{number}": text for number, text in enumerate(drawn, start=1)} | extracts(passage.text)
        found = self._judge.judged(record, prompt, place, {by: text for by, text in texts.items() if text.strip()})
        if found is None:
            self.too_long += 1
            return None
        judged = [asdict(candidate) | verdict._asdict() for candidate, verdict in found]
        return {"title": passage.title, "passage": passage.text, "question": record.id, "candidates": judged}


def pair_of(line: Mapping[str, Any], *, hard: bool) -> PreferencePair | None:
    """The preference pair from a line's candidates, or None if they give none; ``hard`` as in :func:`preferred`."""
    candidates = [Candidate(each["by"], each["text"], each["success"]) for each in line["candidates"]]
    found = preferred(candidates, hard=hard)
    if found is None:
        return None
    chosen, rejected = found
    return PreferencePair(line["passage"], chosen.text, rejected.text, line["title"], chosen.by, rejected.by)


def _read(kept: GrowingFile) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for place, row in kept.rows:
        with blamed_on(place):
            check_shape(row, _LINE, "")
        yield row["key"], row


def digest_of_rewritings(*parts: object) -> str:
    """A digest of everything that determines rewritings and verdicts: digests of models, and settings."""
    return hashlib.sha256(json.dumps([*parts, SAMPLES, TEMPERATURE]).encode()).hexdigest()
