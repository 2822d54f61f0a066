"""JSON lines that are written as they come, and never over others."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any

from lightning.pytorch import Trainer

from lrsa_lit.checkpoints.processes import gathered
from lrsa_lit.errors import UserError
from lrsa_lit.io import PARTIAL
from lrsa_lit.tracking.artifacts import numbered, shared_run_folder, upload

_log = logging.getLogger("lrsa_lit")


class LineFile:
    """A file of JSON lines that are written as they come; of several processes each has its own.

    Args:
        key: the setting of the path, for errors.
        path: as the user named it; None is a new file in the run's folder.
        name: of that file.

    Attributes:
        written: the files of all processes, on the first one, when they are complete.
    """

    def __init__(self, key: str, path: str | None, name: str) -> None:
        self._key, self._path, self._name = key, path, name
        self._target, self._count = Path(), 0
        self._file: IO[bytes] | None = None
        self.written: list[Path] = []

    def check(self) -> None:
        """Refuse a path that is taken.

        Raises:
            UserError: there is a folder or a file.
        """
        if self._path is None:
            return
        path = Path(self._path)
        if path.is_dir():
            raise UserError(f"{self._key}: {path} is a folder; it must be a file")
        for taken in (path, _partial(path)):
            if taken.exists():
                raise UserError(f"{self._key}: {taken} exists; name another file, or null for one in the run's folder")

    def begin(self, trainer: Trainer) -> None:
        """Open the file.

        Raises:
            UserError: it exists or cannot be written.
        """
        self.check()
        self.written, self._count = [], 0
        try:
            asked = shared_run_folder(trainer) / self._name if self._path is None else Path(self._path)
            asked.parent.mkdir(parents=True, exist_ok=True)
            self._open(asked, "" if trainer.world_size == 1 else f".{trainer.global_rank}")
        except OSError as error:
            raise UserError(
                f"{self._key}: {self._path or error.filename} cannot be written ({error.strerror})"
            ) from None

    def write(self, lines: Iterable[Any]) -> None:
        """Add lines; each batch reaches the disk's cache at once.

        Raises:
            UserError: the disk is full, for example; the whole lines before are kept.
        """
        assert self._file is not None
        for line in lines:
            start, text = self._file.tell(), json.dumps(line, ensure_ascii=False) + "\n"
            try:
                # Unbuffered, so a line is there or it is not. Lone surrogates are no UTF-8.
                rest = memoryview(text.encode("utf-8", "backslashreplace"))
                while rest:
                    rest = rest[self._file.write(rest) :]
            except OSError as error:
                self._file.truncate(start)
                self._close()
                partial = _partial(self._target)
                kept = f"the {self._count} answers before stand in {partial}"
                raise UserError(f"{self._key}: {partial} cannot be written ({error.strerror}); {kept}") from None
            self._count += 1

    def finish(self, trainer: Trainer) -> None:
        """Give the file its name, and log those of all processes as artifacts."""
        if self._file is None:
            return
        self._close()
        _partial(self._target).rename(self._target)
        targets: list[Path] = gathered(trainer, self._target)
        if trainer.is_global_zero:
            self.written = targets
            # Those of another machine may stand on a disk of its own.
            upload(trainer, [path for path in targets if path.is_file()])

    def stop(self) -> None:
        """Close the file where the evaluation ends early; without a line there is none."""
        if self._file is None:
            return
        self._close()
        if not self._count:
            _partial(self._target).unlink(missing_ok=True)
            if self._path is None:
                # The run's folder, unless something else is in it.
                with contextlib.suppress(OSError):
                    self._target.parent.rmdir()
        else:
            _log.warning("The %d answers so far stand in %s", self._count, _partial(self._target))

    def _close(self) -> None:
        assert self._file is not None
        self._file.close()
        self._file = None

    def _open(self, asked: Path, process: str) -> None:
        """Open the file; in the run's folder the next one whose name is free, for a run may be evaluated again."""
        for name in numbered(asked):
            target = name.with_name(f"{name.stem}{process}{name.suffix}")
            if not target.exists():
                try:
                    self._file = _partial(target).open("xb", buffering=0)
                except FileExistsError:
                    pass
                else:
                    self._target = target
                    return
            if self._path is not None:
                raise UserError(f"{self._key}: {target} exists; name another file")


def _partial(path: Path) -> Path:
    return path.with_name(path.name + PARTIAL)
