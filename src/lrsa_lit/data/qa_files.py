"""Your own data: files of canonical records, or a data set of the Hugging Face hub with mapped fields."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import datasets

from lrsa_lit.data import fingerprint
from lrsa_lit.data.module import SPLITS, QADataModule, Split
from lrsa_lit.data.reading import SUFFIXES, Row, kind_of, read_rows
from lrsa_lit.data.records import QARecord, read_records, records_of
from lrsa_lit.errors import UserError, message_of
from lrsa_lit.paths import cache_dir, resolve

_FIELDS = tuple(QARecord.__dataclass_fields__)
_OPTIONAL = ("id", "supporting_titles", "supporting_sentences", "match", "task", "turns")


class QAFiles(QADataModule):
    """Records from JSONL or Parquet files, or from a hub data set. Set ``train``, ``val`` and ``test``, or ``hub``.

    Args:
        train: .jsonl, .json or .parquet file of canonical records for training (format: data/README.md).
        val: the same for validation; optional.
        test: the same for testing; optional.
        hub: name of a data set on the Hugging Face hub, or a local folder of one.
        hub_config: configuration of the hub data set, if it has several.
        hub_revision: branch, tag or commit of the hub data set.
        hub_splits: names of the splits in the hub data set. Default: {train: train, val: validation, test: test}.
            Splits that are not named are not used.
        fields: column of each canonical field whose name differs, for example {answers: answers.text}.
        kwargs: see QADataModule.
    """

    def __init__(
        self,
        train: str | None = None,
        val: str | None = None,
        test: str | None = None,
        hub: str | None = None,
        hub_config: str | None = None,
        hub_revision: str | None = None,
        hub_splits: dict[str, str] | None = None,
        fields: dict[str, str] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.train, self.val, self.test = train, val, test
        self.hub, self.hub_config, self.hub_revision = hub, hub_config, hub_revision
        self.hub_splits = hub_splits or {"train": "train", "val": "validation", "test": "test"}
        self.fields = fields or {}
        files = [name for name in SPLITS if getattr(self, name)]
        if bool(files) == bool(hub):
            given = f"both {files[0]} and hub are" if files else "neither train, val, test nor hub is"
            raise UserError("hub", reason=f"{given} set", hint="set either files or hub")
        for key, mapping, known in (("hub_splits", self.hub_splits, SPLITS), ("fields", self.fields, _FIELDS)):
            if wrong := [name for name in mapping if name not in known]:
                raise UserError(key, wrong[0], f"one of {', '.join(known)}")

    def splits(self) -> tuple[Split, ...]:
        """The splits that are set."""
        given = self.hub_splits if self.hub else {name for name in SPLITS if getattr(self, name)}
        return tuple(split for split in SPLITS if split in given)

    def sources(self) -> dict[str, str]:
        """Digests of the files; for a hub data set, the ``datasets`` library's hash and digests of its local files."""
        if not self.hub:
            return super().sources()
        builder = self._builder()
        files = [str(path) for split in self.splits() for path in _local(builder, self.hub_splits[split])]
        # Without paths, which differ between machines.
        digests = enumerate(fingerprint.of_files(files).values())
        return {"hub": str(builder.hash)} | {f"file{number}": digest for number, digest in digests}

    def records(self, split: Split) -> Iterator[QARecord]:
        """The records of a split, in the order of its file."""
        return self._hub_records(split) if self.hub else read_records(resolve(getattr(self, split), key=split))

    def _origin(self, split: Split) -> tuple[str, object]:
        return ("hub", self.hub) if self.hub else (split, getattr(self, split))

    def _builder(self) -> datasets.DatasetBuilder:
        try:
            return datasets.load_dataset_builder(str(self.hub), self.hub_config, **self._hub_options())
        except (OSError, ValueError) as error:
            raise UserError("hub", self.hub, reason=f"cannot be loaded ({message_of(error)})") from None

    def _hub_records(self, split: Split) -> Iterator[QARecord]:
        name = self.hub_splits[split]
        numbers = itertools.count()

        def record(row: Mapping[str, Any]) -> QARecord:
            return QARecord.from_dict(canonical(row, self.fields, default_id=f"{name}-{next(numbers)}"))

        try:
            yield from records_of(self._hub_rows(name), record)
        except UserError as error:
            raise UserError("hub", self.hub, reason=f"has an invalid record ({error})") from None

    def _hub_rows(self, name: str) -> Iterator[Row]:
        """The rows of a hub split; local files are read directly, without the library's type inference."""
        if files := _local(self._builder(), name):
            yield from itertools.chain.from_iterable(map(read_rows, files))
            return
        try:
            rows = datasets.load_dataset(str(self.hub), self.hub_config, split=name, **self._hub_options())
            for number, row in enumerate(rows, start=1):
                yield f"{name} row {number}", row
        except (OSError, ValueError, datasets.exceptions.DatasetGenerationError) as error:
            raise UserError(name, reason=f"cannot be loaded ({message_of(error)})") from None

    def _hub_options(self) -> dict[str, Any]:
        return {"revision": self.hub_revision, "cache_dir": str(cache_dir("hub"))}


def _local(builder: datasets.DatasetBuilder, split: str) -> list[Path]:
    """The files of a split, if all are local and of formats that this project reads; otherwise empty."""
    files = [Path(file) for file in (builder.config.data_files or {}).get(split, ())]
    return files if all(file.suffix in SUFFIXES and file.is_file() for file in files) else []


def canonical(row: Mapping[str, Any], fields: Mapping[str, str], default_id: str) -> dict[str, Any]:
    """Convert a row to the dictionary that :meth:`QARecord.from_dict` reads.

    ``fields`` maps canonical fields to columns; dots lead into nested columns ("answers.text"). Columns that are
    neither mapped nor named like a canonical field are ignored.

    Raises:
        UserError: a required column is missing, or a value has the wrong type.
    """
    record: dict[str, Any] = {}
    for name in _FIELDS:
        if name in fields or name in row or name not in _OPTIONAL:
            record[name] = _shaped(name, _find(row, fields.get(name, name)))
    if record.get("id") is None:
        record["id"] = default_id
    return record


def _find(row: Mapping[str, Any], path: str) -> object:
    value: Any = row
    for name in path.split("."):
        if not isinstance(value, Mapping) or name not in value:
            raise UserError(path, reason=f"no such column; columns are {', '.join(row)}", hint="fields can map another")
        value = value[name]
    return value


def _shaped(name: str, value: object) -> object:
    """Accept common other forms of a field: a string for a list of one, plain texts as passages, a number as id."""
    if name == "id":
        if isinstance(value, bool) or not isinstance(value, str | int | float | None):
            raise UserError("id", reason=f"is {kind_of(value)}", allowed="a string or a number")
        return None if value is None else str(value)
    if name in ("answers", "supporting_titles"):
        texts = [value] if isinstance(value, str) else value
        if not isinstance(texts, list):
            return texts
        # Values of a broken file may not be hashable, so no set is used.
        return [text for place, text in enumerate(texts) if text not in texts[:place]]
    if name != "passages":
        return value
    if isinstance(value, Mapping):  # how `datasets` stores a list of objects: an object of lists
        value = _unpacked(value)
    items = [value] if isinstance(value, str) else value
    return [_passage(item) for item in items] if isinstance(items, list) else items


def _unpacked(columns: Mapping[str, Any]) -> list[dict[str, Any]]:
    titles, texts = columns.get("title", []), columns.get("text", columns.get("sentences", []))
    if not isinstance(titles, list) or not isinstance(texts, list) or len(titles) != len(texts):
        raise UserError("passages", allowed="a list, or an object with as many titles as texts")
    return [{"title": title, "text": text} for title, text in zip(titles, texts, strict=True)]


def _passage(item: object) -> object:
    if isinstance(item, str):
        return {"title": "", "text": item}
    if isinstance(item, Mapping) and isinstance(sentences := item.get("text"), list):
        if wrong := [sentence for sentence in sentences if not isinstance(sentence, str)]:
            raise UserError("passages", reason=f"holds {kind_of(wrong[0])}", allowed="a list of sentences")
        return {**item, "text": "".join(sentences)}
    return item
