"""Question answering from JSONL files in LongBench's format: LongBench's own files, or yours.

Source: Bai et al., "LongBench: A Bilingual, Multitask Benchmark for Long Context Understanding", ACL 2024. Only tasks
that LongBench scores by ``qa_f1`` are supported: English questions with alternative answers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, Literal

from lrsa_lit.data.module import SPLITS, QADataModule, Split
from lrsa_lit.data.prompts import PROMPT, Example, TooLong, prompt_of
from lrsa_lit.data.reading import check_row, read_lines
from lrsa_lit.data.records import Passage, QARecord, check_name, check_record, records_of
from lrsa_lit.data.tokenization import encode_text
from lrsa_lit.errors import UserError
from lrsa_lit.paths import resolve

REQUIRED = {"input": str, "context": str, "answers": [str]}
OPTIONAL = {"_id": str, "dataset": str, "language": str, "length": object, "all_classes": object}

_OTHER_SCORES = {
    **dict.fromkeys(("gov_report", "qmsum", "multi_news", "vcsum", "samsum"), "ROUGE-L"),
    **dict.fromkeys(("trec", "lsht"), "classification accuracy"),
    **dict.fromkeys(("passage_retrieval_en", "passage_retrieval_zh", "passage_count"), "the numbers named"),
    **dict.fromkeys(("lcc", "repobench-p"), "edit similarity"),
    "triviaqa": "qa_f1 of the first line, asked without a chat template",
}


class LongBench(QADataModule):
    """Records in LongBench's format; each ``dataset`` is scored separately.

    Args:
        train: .jsonl file or files for training; optional.
        val: the same for validation; optional.
        test: the same for testing; optional.
        prompt: template of the user's message with {context} and {input}, as in LongBench's ``dataset2prompt.json``:
            one for all records, or one by ``dataset``. Null, or a ``dataset`` that is not named, uses the default
            prompt.
        truncate: "middle" cuts the middle out of contexts that do not fit, as LongBench does, and counts these records
            as ``truncated``. Null leaves them out.
        kwargs: see QADataModule.
    """

    def __init__(
        self,
        train: str | list[str] | None = None,
        val: str | list[str] | None = None,
        test: str | list[str] | None = None,
        prompt: str | dict[str, str] | None = None,
        truncate: Literal["middle"] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.train, self.val, self.test = train, val, test
        self.prompt = prompt
        self.truncate = truncate
        if not self.splits():
            raise UserError("train, val, test", reason="none is set", allowed="at least one")
        given = prompt if isinstance(prompt, dict) else {"": prompt}
        self._prompts = {
            name: prompt_of(f"prompt{name and '.'}{name}", text) for name, text in given.items() if text is not None
        }

    def splits(self) -> tuple[Split, ...]:
        """The splits that are set."""
        return tuple(split for split in SPLITS if self._files(split))

    def records(self, split: Split) -> Iterator[QARecord]:
        """The records of a split in the order of its files, truncated if ``truncate`` is set."""
        # Files with the same name in several folders share a counter, so ids stay unique.
        counts: Counter[str] = Counter()
        for file in self._files(split):
            path = resolve(file, key=split)
            for record in records_of(read_lines(path), _record):
                counts[path.stem] += 1
                name = record.id or f"{path.stem}-{counts[path.stem]}"
                record = replace(record, id=name, task=record.task or path.stem)
                found = self.to_example(record) if self.truncate else None
                if isinstance(found, TooLong):
                    record = self._cut(record, found)
                    self.report[split]["truncated"] += 1
                yield record

    def to_example(self, record: QARecord) -> Example | TooLong:
        """Tokenise a record with the prompt of its ``dataset``."""
        prompt = self._prompts.get(record.task if isinstance(self.prompt, dict) else "", PROMPT)
        return self.encode(record, prompt=prompt)

    def _cut(self, record: QARecord, found: Example | TooLong) -> QARecord:
        """Remove as few tokens as necessary from the middle of a record's context."""
        text = record.passages[0].text
        spans = encode_text(self.checked_tokenizer, text).offsets
        kept = len(spans)
        # Joining the halves may change the tokenisation and add tokens, so the first cut may not be enough.
        while isinstance(found, TooLong) and kept:
            kept = max(kept - (found.tokens - self.max_tokens), 0)
            head, tail = spans[: kept // 2], spans[len(spans) - (kept - kept // 2) :]
            ends = (text[: head[-1][1]] if head else "") + (text[tail[0][0] :] if tail else "")
            record = replace(record, passages=(Passage("", ends),))
            found = self.to_example(record)
        return record

    def _origin(self, split: Split) -> tuple[str, object]:
        return split, getattr(self, split)

    def _files(self, split: Split) -> list[str]:
        given = getattr(self, split)
        return [given] if isinstance(given, str) else list(given or [])


def _record(row: Mapping[str, Any]) -> QARecord:
    """Convert a row in LongBench's format to a record; id and task are empty if the row has none."""
    check_row(row, REQUIRED, OPTIONAL)
    check_name("dataset", row.get("dataset") or "")
    _check_scored_by_f1(row)
    if not row["context"]:
        raise UserError("context", reason="is empty")
    if not row["input"]:
        raise UserError("input", reason="is empty", allowed="a question")
    passages, answers = (Passage("", row["context"]),), tuple(row["answers"])
    record = QARecord(row.get("_id") or "", passages, row["input"], answers, task=row.get("dataset") or "")
    check_record(record)
    return record


def _check_scored_by_f1(row: Mapping[str, Any]) -> None:
    language, data_set = row.get("language") or "en", row.get("dataset") or ""
    if language != "en":
        raise UserError("language", language, "en, as the score qa_f1 is for English words")
    if row.get("all_classes"):
        raise UserError("all_classes", reason="is set", allowed="null, as the score qa_f1 is not for classes")
    if data_set.removesuffix("_e") in _OTHER_SCORES:
        other = _OTHER_SCORES[data_set.removesuffix("_e")]
        raise UserError("dataset", data_set, "scored by qa_f1", reason=f"is scored by {other}")
