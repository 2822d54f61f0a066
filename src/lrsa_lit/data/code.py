"""What code makes a data set's examples, as a part of the key that they are cached under."""

from __future__ import annotations

import hashlib
import inspect
import sys
import uuid
from pathlib import Path

from lrsa_lit import chat_template
from lrsa_lit.evaluation import metrics

_NO_FILE = "no file "


def definition(defined: type) -> str:
    """Names the code of a class by the source of its module; to be called when the class is defined.

    A class of no file, as in a notebook, has a name that no other definition ever has, not even the same one again.
    """
    try:
        source = inspect.getsource(sys.modules[defined.__module__])
    except (KeyError, OSError, TypeError):
        return f"{_NO_FILE}{uuid.uuid4().hex}"
    return hashlib.sha256(source.encode()).hexdigest()


def is_of_a_file(name: str) -> bool:
    """Whether a name of :func:`definition` comes from a file, so that it means the same in another process."""
    return not name.startswith(_NO_FILE)


def _project() -> str:
    """Names this project's code of records, prompts and data sets."""
    files = [*Path(__file__).parent.glob("*.py"), Path(chat_template.__file__), Path(metrics.__file__)]
    digests = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
    return hashlib.sha256(repr(sorted(digests.items())).encode()).hexdigest()


# Read now: a later edit is not what this process runs.
PROJECT = _project()
