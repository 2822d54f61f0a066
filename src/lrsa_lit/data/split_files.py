"""Base class of data sets that read the user's own files, with separate files for each split."""

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
    """Files for each split; a folder means all files in it, sorted by name.

    Args:
        train: a file, a folder, or a list of them, for training; optional.
        val: the same for validation; optional.
        test: the same for testing; optional.
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
            raise UserError("train", reason="neither train, val nor test is set", hint="set at least one of them")

    def splits(self) -> tuple[Split, ...]:
        """The splits that are set."""
        return tuple(split for split in SPLITS if getattr(self, split))

    def files(self, split: Split) -> list[Path]:
        """The files of a split; raises a UserError if there are none."""
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
        """The rows of a split's files, each with its place for errors."""
        return itertools.chain.from_iterable(map(read_rows, self.files(split)))

    def _names(self, split: Split) -> list[str]:
        given = getattr(self, split)
        return [given] if isinstance(given, str) else list(given)

    def _inside(self, name: str) -> list[Path] | None:
        """The files of a folder; None if ``name`` is not a folder."""
        folder = expanded("train", name)
        return sorted(path for path in folder.iterdir() if path.suffix in self.suffixes) if folder.is_dir() else None

    @property
    def _allowed(self) -> str:
        return " or ".join(self.suffixes)

    def _origin(self, split: Split) -> tuple[str, object]:
        return split, getattr(self, split)
