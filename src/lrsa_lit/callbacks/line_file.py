"""JSONL files that are written line by line, merged over processes at the end, and never overwrite a file."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any

from lightning.pytorch import Trainer

from lrsa_lit.errors import UserError
from lrsa_lit.io import PARTIAL, write_atomically
from lrsa_lit.strategies import gathered
from lrsa_lit.tracking.artifacts import numbered, shared_run_folder, upload

_log = logging.getLogger("lrsa_lit")


class LineFile:
    """A file of JSON lines that are written one by one.

    With several processes, each writes its own file. At the end, the first process merges them in the order of
    positions. On several machines, whose disks may differ, the files are kept separate.

    Args:
        key: the setting that names the path, for errors.
        path: the path given by the user; None is a new file in the run's folder.
        name: name of that new file.

    Attributes:
        written: the complete files, on the first process; empty before.
    """

    def __init__(self, key: str, path: str | None, name: str) -> None:
        self._key, self._path, self._name = key, path, name
        self._target = self._own = self._partial = Path()
        self._positions: list[int] = []
        self._file: IO[bytes] | None = None
        self.written: list[Path] = []

    def check(self) -> None:
        """Raise a UserError if the path already exists."""
        if self._path is None:
            return
        path = Path(self._path)
        if path.is_dir():
            raise UserError(self._key, path, "a file", reason="is a folder")
        for taken in (path, _partial(path)):
            if taken.exists():
                raise self._exists(taken)

    def begin(self, trainer: Trainer) -> None:
        """Open the file; raise a UserError if it exists or cannot be written."""
        self.check()
        self.written, self._positions = [], []
        try:
            asked = shared_run_folder(trainer) / self._name if self._path is None else Path(self._path)
            asked.parent.mkdir(parents=True, exist_ok=True)
            self._open(asked, "" if trainer.world_size == 1 else f".{trainer.global_rank}")
        except OSError as error:
            raise self._unwritable(self._path or error.filename, error) from None

    def write(self, lines: Iterable[Any], positions: Iterable[int]) -> None:
        """Write lines, each with its position among the lines of all processes, without buffering.

        Raises:
            UserError: a line cannot be written, for example because the disk is full; earlier lines are kept.
        """
        assert self._file is not None
        for line, position in zip(lines, positions, strict=True):
            start, text = self._file.tell(), json.dumps(line, ensure_ascii=False) + "\n"
            try:
                # Unbuffered, so a line is written completely or not at all. UTF-8 cannot encode lone surrogates.
                rest = memoryview(text.encode("utf-8", "backslashreplace"))
                while rest:
                    rest = rest[self._file.write(rest) :]
            except OSError as error:
                self._file.truncate(start)
                self._close()
                kept = f"; the {len(self._positions)} answers before are in {self._partial}"
                raise self._unwritable(self._partial, error, kept) from None
            self._positions.append(position)

    def finish(self, trainer: Trainer) -> None:
        """Merge the lines of all processes into the final file, and log it as an artifact."""
        if self._file is None:
            return
        self._close()
        if trainer.num_nodes > 1:
            self._partial.rename(self._own)
            targets: list[Path] = gathered(self._own)
        else:
            parts = gathered((self._partial, self._positions))
            targets = [self._target]
            if trainer.is_global_zero:
                self._join(parts)
        if trainer.is_global_zero:
            self.written = targets
            # Files of other machines may be on disks that this machine cannot read.
            upload(trainer, [path for path in targets if path.is_file()])

    def _join(self, parts: list[tuple[Path, list[int]]]) -> None:
        """Write the lines of all processes in order, then remove the files of the single processes."""
        try:
            lines = [line for path, positions in parts
                     for line in zip(positions, path.read_bytes().splitlines(keepends=True), strict=True)]  # fmt: skip
            write_atomically(self._target, lambda file: file.writelines(line for _, line in sorted(lines)))
        except OSError as error:
            raise self._unwritable(self._target, error) from None
        for path, _ in parts:
            path.unlink()

    def stop(self) -> None:
        """Close the file if the evaluation ends early; an empty file is removed."""
        if self._file is None:
            return
        self._close()
        if self._positions:
            _log.warning("The %d answers so far are in %s", len(self._positions), self._partial)
            return
        self._partial.unlink(missing_ok=True)
        if self._path is None:
            # Remove the run's folder, unless it contains something else.
            with contextlib.suppress(OSError):
                self._target.parent.rmdir()

    def _close(self) -> None:
        assert self._file is not None
        self._file.close()
        self._file = None

    def _open(self, asked: Path, process: str) -> None:
        """Open the file; in the run's folder, with the next free name, because a run may be evaluated again."""
        for target in numbered(asked) if self._path is None else [asked]:
            self._target = target
            self._own = self._target.with_name(f"{self._target.stem}{process}{self._target.suffix}")
            self._partial = _partial(self._own)
            with contextlib.suppress(FileExistsError):
                if not self._target.exists():
                    self._file = self._partial.open("xb", buffering=0)
                    return
        raise self._exists(self._target)

    def _exists(self, path: Path) -> UserError:
        reason = "exists; name another file, or null for one in the run's folder"
        return UserError(self._key, path, reason=reason)

    def _unwritable(self, path: object, error: OSError, kept: str = "") -> UserError:
        return UserError(self._key, path, reason=f"cannot be written ({error.strerror}){kept}")


def _partial(path: Path) -> Path:
    return path.with_name(path.name + PARTIAL)
