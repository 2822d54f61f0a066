"""The base of data sets that are made from one file and cut into splits of this project's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lrsa_lit.data.module import QADataModule, Split
from lrsa_lit.data.splits import check_fractions
from lrsa_lit.paths import resolve


class OneFileDataModule(QADataModule):
    """One source file, verified by its digest, of which shares are held out.

    Args:
        source: the file, a path or package://DISTRIBUTION/FILE.
        sha256: expected digest of the file; null skips the check.
        val_fraction: share to validate on.
        test_fraction: share to test on.
        kwargs: see QADataModule.
    """

    def __init__(
        self,
        source: str,
        sha256: str | None = None,
        val_fraction: float = 0.1,
        test_fraction: float = 0.1,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check_fractions(val_fraction, test_fraction)
        self.source = source
        self.sha256 = sha256
        self.val_fraction = val_fraction
        self.test_fraction = test_fraction

    def path(self) -> Path:
        """The source file, known to be the expected one."""
        return resolve(self.source, self.sha256, "source")

    def _origin(self, split: Split) -> tuple[str, object]:
        return "source", self.source
