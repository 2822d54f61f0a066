"""The base of data sets that are read from files of the user's own, some for each split."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

from lrsa_lit.data import fingerprint
from lrsa_lit.data.module import SPLITS, QADataModule, Split
from lrsa_lit.data.reading import SUFFIXES, Row, read_rows
from lrsa_lit.errors import UserError
from lrsa_lit.paths import expanded, resolve


class SplitFiles(QADataModule):
    """Files by the split that they are for; a folder stands for those in it, in the order of their names.

    Args:
        train: a file, a folder, or several of them, to train on.
        val: the same, to validate on; optional.
        test: the same, to test on.
        kwargs: see QADataModule.
    """

    suffixes: ClassVar[tuple[str, ...]] = SUFFIXES
    filterable: ClassVar[bool] = False

    def __init__(
        self,
        train: str | list[str] | None = None,
        val: str | list[str] | None = None,
        test: str | list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.train, self.val, self.test = train, val, test
        if not self.splits():
            raise UserError("train", reason="neither train, val nor test is set", hint="set one of them at least")

    def splits(self) -> tuple[Split, ...]:
        """The splits that were given."""
        return tuple(split for split in SPLITS if getattr(self, split))

    def files(self, split: Split) -> list[Path]:
        """The files of a split; a UserError if there is none."""
        found: list[Path] = []
        for name in self._names(split):
            inside = self._inside(name)
            if inside == []:
                raise UserError(split, name, reason=f"is a folder without any file that ends in {self._allowed}")
            found += [resolve(name, key=split)] if inside is None else inside
        return found

    def sources(self) -> dict[str, str]:
        """Size and SHA-256 of every file."""
        names = dict.fromkeys(itertools.chain.from_iterable(map(self._names, self.splits())))
        return fingerprint.of_files([str(path) for name in names for path in self._inside(name) or (Path(name),)])

    def rows(self, split: Split) -> Iterator[Row]:
        """The rows of a split's files, each with its place."""
        return itertools.chain.from_iterable(map(read_rows, self.files(split)))

    def _names(self, split: Split) -> list[str]:
        given = getattr(self, split)
        return [given] if isinstance(given, str) else list(given)

    def _inside(self, name: str) -> list[Path] | None:
        """The files of a folder; None where the name is not that of one."""
        folder = expanded("train", name)
        return sorted(path for path in folder.iterdir() if path.suffix in self.suffixes) if folder.is_dir() else None

    @property
    def _allowed(self) -> str:
        return " or ".join(self.suffixes)

    def _origin(self, split: Split) -> tuple[str, object]:
        return split, getattr(self, split)
