"""A JSONL file that a long command appends to line by line; killing the command loses at most the current line."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from lrsa_lit.data.reading import Row, read_lines
from lrsa_lit.errors import UserError
from lrsa_lit.io import lock


class GrowingFile:
    """An open file of JSON lines, created by :func:`growing_file`.

    Attributes:
        path: path of the file.
        rows: the lines that existed when it was opened, each with its place for errors.
    """

    def __init__(self, path: Path, file: IO[bytes]) -> None:
        self.path, self._file = path, file
        self.rows: list[Row] = list(read_lines(path))

    def add(self, line: Mapping[str, Any]) -> None:
        """Append a line and sync it to disk; after an OSError, the file is as it was before."""
        start, text = self._file.seek(0, os.SEEK_END), json.dumps(line, ensure_ascii=False) + "\n"
        rest = memoryview(text.encode("utf-8", "backslashreplace"))
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
            os.fsync(self._file.fileno())
        except OSError:
            self._file.truncate(start)
            raise


@contextlib.contextmanager
def growing_file(key: str, path: Path) -> Iterator[GrowingFile]:
    """Open or create a file to append lines to; an unfinished last line is removed.

    Args:
        key: the setting that names the path, for errors.
        path: the file; missing parent folders are created.

    Raises:
        UserError: the file cannot be written, another process is writing it, or it contains invalid JSON.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Unbuffered, so that close() never writes leftover data.
        with path.open("a+b", buffering=0) as file:
            if not lock(file, otherwise=True):
                raise UserError(key, path, reason="is being written by another process; wait until it has ended")
            _cut_unfinished(file)
            yield GrowingFile(path, file)
    except OSError as error:
        raise UserError(key, path, reason=f"cannot be written ({error.strerror or error})") from None


def _cut_unfinished(file: IO[bytes]) -> None:
    file.seek(0)
    content = file.read()
    file.truncate(content.rfind(b"\n") + 1)
