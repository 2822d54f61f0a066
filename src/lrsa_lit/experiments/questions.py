"""The tokenised data sets of a study in a folder, with an index that runs can read before the data."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lrsa_lit.data.split_facts import SplitFacts
from lrsa_lit.errors import UserError, under
from lrsa_lit.experiments.study import Settings, Study, Work, digest
from lrsa_lit.io import write_atomically
from lrsa_lit.paths import check_writable

if TYPE_CHECKING:
    from datasets import Dataset

_CACHE = "LRSA_CACHE_DIR"
_FIELDS = {"asked", "folder", "facts"}
"""Fields of a split in the index: the digest of its settings, its folder, and the facts that identify its examples."""


class Questions:
    """The tokenised data sets of a study; the commands that the study runs use the folder as their cache.

    Raises:
        UserError: the folder's index is invalid. Methods also raise it if a split is not in the index or its settings
            have changed since.
    """

    def __init__(self, study: Study, folder: Path) -> None:
        self._study, self.folder = study, folder
        self._index = folder / f"{study.title}.json"
        self._splits = _read(self._index)
        # Environment with which commands use the folder as their cache.
        self.environment = {_CACHE: str(folder.absolute())}

    def prepare(self, splits: Iterable[tuple[str, str]], *, anew: bool = False) -> None:
        """Tokenise the splits that are not in the folder yet, and print their numbers of examples.

        Args:
            splits: (data set, split) pairs.
            anew: also check splits that are in the index, because the code that makes examples may have changed.

        Raises:
            UserError: a split cannot be made, or the folder cannot be written.
        """
        missing = [split for split in dict.fromkeys(splits) if anew or self._found(*split) is None]
        if missing:
            check_writable("--data", self.folder, self.folder)
        for data_set, split in missing:
            with self._in_folder(), under(f"data_sets.{data_set}"):
                folder, facts = self._prepared(data_set, split)
            about = {"asked": self._asked(data_set), "folder": str(folder), "facts": asdict(facts)}
            self._splits[f"{data_set}/{split}"] = about
            write_atomically(self._index, lambda file: file.write(json.dumps(self._splits).encode()))
            print(f"{data_set}/{split}: {facts.questions} examples, {facts.digest}", flush=True)

    def facts(self, data_set: str, split: str) -> SplitFacts:
        """The facts that identify the examples of a split."""
        return SplitFacts(**self._named(data_set, split)["facts"])

    def examples(self, data_set: str, split: str) -> Dataset:
        """The examples of a split."""
        from lrsa_lit.data import token_cache

        return token_cache.load(self.folder / self._named(data_set, split)["folder"])[0]

    def _named(self, data_set: str, split: str) -> Settings:
        if (found := self._found(data_set, split)) is None:
            reason = f"has no {data_set}/{split} of this study"
            raise UserError("--data", str(self.folder), reason=reason, hint="`lrsa study data` makes it")
        return found

    def _found(self, data_set: str, split: str) -> Settings | None:
        found = self._splits.get(f"{data_set}/{split}")
        return found if found and found["asked"] == self._asked(data_set) else None

    def _asked(self, data_set: str) -> str:
        """Digest of the settings that decide the examples of a data set; code is not included."""
        model = self._study.common["model"]
        backbone = {name: model["backbone"].get(name) for name in ("source", "sha256")}
        return digest([self._study.data_set(data_set), backbone, model.get("template_arguments")])

    def _prepared(self, data_set: str, split: Any) -> tuple[Path, SplitFacts]:
        from lrsa_lit.chat_template import with_arguments
        from lrsa_lit.data.module import QADataModule
        from lrsa_lit.models import Backbone

        made, model = self._study.fit_settings.made, self._study.common["model"]
        module: QADataModule = made("init_args", QADataModule, self._study.data_set(data_set))
        tokenizer = made("model.backbone", Backbone, model["backbone"]).tokenizer
        module.tokenizer = with_arguments(tokenizer, model.get("template_arguments") or {})
        module.prepare_split(split)
        return module.folder(split).relative_to(self.folder.absolute()), SplitFacts.of(module.open_split(split))

    @contextlib.contextmanager
    def _in_folder(self) -> Iterator[None]:
        before = os.environ.get(_CACHE)
        os.environ.update(self.environment)
        try:
            yield
        finally:
            del os.environ[_CACHE]
            os.environ.update({} if before is None else {_CACHE: before})


def splits_of(works: Sequence[Work]) -> list[tuple[str, str]]:
    """The splits that are used by the trainings and evaluations of ``works``."""
    found = dict.fromkeys((name, "train") for work in works for name in work.row.train_sets)
    return list(found | dict.fromkeys((item.data_set, item.split) for work in works for item in work.evaluations))


def _read(path: Path) -> dict[str, Settings]:
    try:
        content: dict[str, Settings] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        if all(entry.keys() == _FIELDS for entry in content.values()):
            return content
    except (OSError, ValueError, AttributeError):
        pass
    raise UserError("--data", str(path), reason="is not an index written by `lrsa study data`")
