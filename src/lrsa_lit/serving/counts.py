"""The folder in which the processes of a server keep their Prometheus metrics."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

_FOLDER = "PROMETHEUS_MULTIPROC_DIR"


@contextmanager
def share_counts() -> Iterator[None]:
    """Let all processes of a server count in a temporary folder. Enter it before ``prometheus_client`` is imported.

    Later processes must not inherit the name of a folder that is gone: their own metrics would go there too.
    """
    before = os.environ.get(_FOLDER)
    with tempfile.TemporaryDirectory(prefix="lrsa-serve-") as folder:
        os.environ[_FOLDER] = folder
        try:
            yield
        finally:
            if before is None:
                del os.environ[_FOLDER]
            else:
                os.environ[_FOLDER] = before
